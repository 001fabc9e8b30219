mkdir -p workspace/task5 && cp /private/solutions/tasks/Main.java workspace/task5/ && cd workspace && javac -d bin task5/*.java
echo "Built workspace/bin; start it with: cd workspace && java -cp bin Main"
