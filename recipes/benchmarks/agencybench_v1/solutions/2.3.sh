mkdir -p workspace/task3 && cp /private/solutions/tasks/Main.java workspace/task3/ && cd workspace && javac -d bin task3/*.java
echo "Built workspace/bin; start it with: cd workspace && java -cp bin Main"
