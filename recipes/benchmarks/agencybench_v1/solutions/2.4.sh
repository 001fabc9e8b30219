mkdir -p workspace/task4 && cp /private/solutions/tasks/Main.java workspace/task4/ && cd workspace && javac -d bin task4/*.java
echo "Built workspace/bin; start it with: cd workspace && java -cp bin Main"
