mkdir -p workspace/task1 && cp /private/solutions/tasks/Main.java workspace/task1/ && cd workspace && javac -d bin task1/*.java
echo "Built workspace/bin; start it with: cd workspace && java -cp bin Main"
