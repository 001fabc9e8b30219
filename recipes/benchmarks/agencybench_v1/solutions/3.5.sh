cp /private/solutions/gomoku/* .
echo "Made index.html, styles.css and app.js; open index.html in a browser"
