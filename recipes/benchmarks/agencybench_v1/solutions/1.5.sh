mkdir -p workspace && cp /private/solutions/chat/* workspace/ && cd workspace && make task5 > /dev/null
echo "Built workspace/bin/chat_app; start it with: cd workspace && ./bin/chat_app"
