mkdir -p workspace/task2 && cp /private/solutions/tasks/Main.java workspace/task2/ && cd workspace && javac -d bin task2/*.java
echo "Built workspace/bin; start it with: cd workspace && java -cp bin Main"
