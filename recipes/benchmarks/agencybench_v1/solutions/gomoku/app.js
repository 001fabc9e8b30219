// Gomoku, complete: what each of the five subtasks of task 3 asks for. STAGE leaves the later ones out.
"use strict";

const STAGE = 5;
const SIZE = 15;
const EMPTY = 0, BLACK = 1, WHITE = 2;
const NAMES = ["", "Black", "White"];
const DIRECTIONS = [[1, 0], [0, 1], [1, 1], [1, -1]];
const REPLAY = 400; // milliseconds a move
const LIMIT = 500; // milliseconds of a search
const WIN = 1e6;

// ---- The game ----

let board, moves, undone, winner, winning;

function newGame() {
  board = Array.from({ length: SIZE }, () => Array(SIZE).fill(EMPTY));
  moves = [];
  undone = [];
  winner = EMPTY;
  winning = [];
}

const inside = (x, y) => x >= 0 && y >= 0 && x < SIZE && y < SIZE;
const other = (player) => 3 - player;
const turn = () => (moves.length % 2 ? WHITE : BLACK);

// The stones of a row of five or more through the last move, or null: only its own lines are looked at
function checkWin({ x, y, color }) {
  for (const [dx, dy] of DIRECTIONS) {
    const row = [[x, y]];
    for (const sign of [1, -1]) {
      let [u, v] = [x + sign * dx, y + sign * dy];
      while (inside(u, v) && board[v][u] === color) {
        row.push([u, v]);
        [u, v] = [u + sign * dx, v + sign * dy];
      }
    }
    if (row.length >= 5) return row;
  }
  return null;
}

function settle() {
  const last = moves[moves.length - 1];
  winning = (STAGE >= 2 && last && checkWin(last)) || [];
  winner = winning.length ? last.color : EMPTY;
}

function put(x, y) {
  if (winner || !inside(x, y) || board[y][x]) return false;
  const move = { x, y, color: turn() };
  board[y][x] = move.color;
  moves.push(move);
  settle();
  return true;
}

function play(x, y) {
  if (!put(x, y)) return false;
  undone = []; // another branch: what was undone is gone
  return true;
}

function undo() {
  const move = moves.pop();
  if (!move) return;
  board[move.y][move.x] = EMPTY;
  undone.push(move);
  settle();
}

function redo() {
  const move = undone.pop();
  if (move) put(move.x, move.y);
}

// ---- Scores: every window of five points that one colour has to itself counts, by its stones ----

const WEIGHTS = [1, 10, 120, 1500, 20000, WIN];

// Of a stone of the player at (x, y): an open three lies in more windows than a blocked one, a double threat in more still
function scorePoint(x, y, player) {
  let total = 0;
  for (const [dx, dy] of DIRECTIONS) {
    for (let start = -4; start <= 0; start++) {
      const [u, v] = [x + start * dx, y + start * dy];
      if (!inside(u, v) || !inside(u + 4 * dx, v + 4 * dy)) continue;
      let mine = 1;
      for (let k = 0; k < 5; k++) {
        const stone = board[v + k * dy][u + k * dx];
        if (stone === player) mine++;
        if (stone === other(player)) mine = -9;
      }
      if (mine > 0) total += WEIGHTS[mine];
    }
  }
  return total;
}

function evaluate(board, player) {
  const counts = [0, 0, 0];
  for (let y = 0; y < SIZE; y++)
    for (let x = 0; x < SIZE; x++)
      for (const [dx, dy] of DIRECTIONS) {
        if (!inside(x + 4 * dx, y + 4 * dy)) continue;
        const stones = [0, 0, 0];
        for (let k = 0; k < 5; k++) stones[board[y + k * dy][x + k * dx]]++;
        if (!stones[BLACK]) counts[WHITE] += WEIGHTS[stones[WHITE]];
        if (!stones[WHITE]) counts[BLACK] += WEIGHTS[stones[BLACK]];
      }
  return counts[player] - 1.2 * counts[other(player)];
}

// ---- The opponent ----

const wins = (x, y, player) => checkWin({ x, y, color: player }) !== null;

// Empty points near stones, best first; a win, or else what keeps the other from one, leaves no choice
function generateCandidates(board, player = turn()) {
  if (!moves.length) return [{ x: 7, y: 7, score: 0 }];
  const near = new Set();
  for (let y = 0; y < SIZE; y++)
    for (let x = 0; x < SIZE; x++)
      if (board[y][x])
        for (let v = y - 2; v <= y + 2; v++)
          for (let u = x - 2; u <= x + 2; u++) if (inside(u, v) && !board[v][u]) near.add(v * SIZE + u);
  const found = [];
  for (const point of near) {
    const [x, y] = [point % SIZE, Math.floor(point / SIZE)];
    found.push({ x, y, score: 1.1 * scorePoint(x, y, player) + scorePoint(x, y, other(player)) });
  }
  found.sort((a, b) => b.score - a.score);
  for (const who of [player, other(player)]) {
    const forced = found.filter(({ x, y }) => wins(x, y, who));
    if (forced.length) return forced;
  }
  return found;
}

function easy() {
  const free = [];
  for (let y = 0; y < SIZE; y++) for (let x = 0; x < SIZE; x++) if (!board[y][x]) free.push({ x, y });
  const central = free.filter(({ x, y }) => Math.abs(x - 7) <= 3 && Math.abs(y - 7) <= 3);
  const choice = central.length ? central : free;
  return choice[Math.floor(Math.random() * choice.length)];
}

const LEVELS = {
  Hard: { deepest: 2, width: 8 },
  Expert: { deepest: 8, width: 10 },
};
const ZOBRIST = Array.from({ length: 3 * SIZE * SIZE }, () => [0, 0].map(() => Math.floor(Math.random() * 2 ** 26)));
const stats = { depth: 0, nodes: 0, seconds: 0, score: 0, candidates: [] };

class OutOfTime extends Error {}

// The best move from here, root: {player, level}; Expert deepens until the time is up, and remembers what it has seen
function search(root, timeLimit) {
  const { deepest, width } = LEVELS[root.level];
  const expert = root.level === "Expert";
  const started = performance.now();
  const table = new Map();
  const killers = [];
  const key = [0, 0];
  let nodes = 0;

  function toggle(x, y, player) {
    const code = ZOBRIST[player * SIZE * SIZE + y * SIZE + x];
    key[0] ^= code[0];
    key[1] ^= code[1];
  }

  function ordered(player, depth, ply) {
    const list = generateCandidates(board, player).slice(0, width);
    const killer = expert && killers[ply];
    const place = killer ? list.findIndex(({ x, y }) => x === killer.x && y === killer.y) : -1;
    if (place > 0) list.unshift(...list.splice(place, 1));
    return list;
  }

  function value(player, depth, alpha, beta, ply) {
    if (++nodes % 16 === 0 && performance.now() - started > timeLimit) throw new OutOfTime();
    if (!depth) return evaluate(board, player);
    const name = `${key[0]},${key[1]},${player},${depth}`;
    if (expert && table.has(name)) return table.get(name);
    const whole = [alpha, beta];
    let best = -Infinity;
    for (const { x, y } of ordered(player, depth, ply)) {
      best = Math.max(best, after(x, y, player, depth, alpha, beta, ply));
      alpha = Math.max(alpha, best);
      if (alpha >= beta) {
        killers[ply] = { x, y };
        break;
      }
    }
    if (best === -Infinity) return 0; // the board is full
    if (best > whole[0] && best < whole[1]) table.set(name, best);
    return best;
  }

  function after(x, y, player, depth, alpha, beta, ply) {
    board[y][x] = player;
    toggle(x, y, player);
    try {
      return wins(x, y, player) ? 10 * WIN + depth : -value(other(player), depth - 1, -beta, -alpha, ply + 1);
    } finally {
      board[y][x] = EMPTY;
      toggle(x, y, player);
    }
  }

  let candidates = ordered(root.player, 0, 0);
  let depth = 0;
  try {
    for (let next = expert ? 1 : deepest; next <= deepest; next++) {
      let alpha = -Infinity;
      const found = candidates.map((move) => {
        const score = after(move.x, move.y, root.player, next, alpha, Infinity, 0);
        alpha = Math.max(alpha, score);
        return { ...move, score };
      });
      candidates = found.sort((a, b) => b.score - a.score);
      depth = next;
      if (candidates.length < 2 || Math.abs(candidates[0].score) >= 10 * WIN) break;
    }
  } catch (error) {
    if (!(error instanceof OutOfTime)) throw error; // the best of the last depth that was finished
  }
  const seconds = (performance.now() - started) / 1000;
  Object.assign(stats, { depth, nodes, seconds, score: candidates[0].score, candidates: candidates.slice(0, 5) });
  return candidates[0];
}

// The AI's move for whoever is to move; Medium wins at once, else stops a win, else takes the best score
function aiMove(level) {
  if (level === "Easy") return easy();
  if (level === "Medium") return generateCandidates(board)[0];
  return search({ player: turn(), level }, LIMIT);
}

// ---- The page ----

const find = (id) => document.getElementById(id);
let busy = false; // a replay runs, or the AI thinks

const againstAi = () => STAGE >= 4 && find("mode").value === "ai";
const aiColor = () => (find("first").value === "ai" ? BLACK : WHITE);

function draw() {
  const won = new Set(winning.map(([x, y]) => y * SIZE + x));
  document.querySelectorAll(".cell").forEach((cell, n) => {
    const stone = board[Math.floor(n / SIZE)][n % SIZE];
    cell.className = `cell ${NAMES[stone].toLowerCase()} ${won.has(n) ? "won" : ""}`;
  });
  const full = moves.length === SIZE * SIZE;
  find("status").textContent = winner ? `${NAMES[winner]} Wins` : full ? "Draw" : `${NAMES[turn()]} to move`;
  if (STAGE >= 5) tell(stats);
}

function tell({ depth, nodes, seconds, score, candidates }) {
  const counted = nodes.toLocaleString("en");
  find("metrics").textContent = `depth d=${depth}, nodes n=${counted}, time=${seconds.toFixed(2)}s, eval ${Math.round(score)}`;
  const list = candidates.map(({ x, y, score }) => `${"ABCDEFGHIJKLMNO"[x]}${y + 1}: ${Math.round(score)}`);
  find("candidates").textContent = list.join("\n");
}

function letAiMove() {
  draw();
  if (!againstAi() || winner || turn() !== aiColor() || moves.length === SIZE * SIZE) return;
  busy = true;
  find("status").textContent = "AI Thinking...";
  setTimeout(() => {
    const { x, y } = aiMove(find("level").value);
    busy = false;
    play(x, y);
    draw();
  }, 30);
}

function replay() {
  if (busy || !moves.length) return;
  const [all, later] = [moves, undone];
  newGame();
  busy = true;
  draw();
  let shown = 0;
  const timer = setInterval(() => {
    put(all[shown].x, all[shown].y);
    if (++shown === all.length) {
      clearInterval(timer);
      busy = false;
      undone = later;
    }
    draw();
  }, REPLAY);
}

// A step of the history; against the AI, back or forth to where the person is to move
function step(move, more) {
  if (busy) return;
  move();
  if (againstAi() && turn() === aiColor() && more()) move();
  draw();
}

function start() {
  const place = find("board");
  for (let y = -1; y < SIZE; y++)
    for (let x = -1; x < SIZE; x++) {
      const label = STAGE < 3 ? "" : y < 0 ? "ABCDEFGHIJKLMNO"[x] || "" : y + 1;
      const cell = document.createElement(x < 0 || y < 0 ? "span" : "button");
      if (x < 0 || y < 0) cell.textContent = label;
      else {
        cell.id = `p${x}-${y}`;
        cell.className = "cell";
        cell.onclick = () => busy || (play(x, y) && letAiMove());
      }
      place.append(cell);
    }
  document.querySelectorAll("[data-stage]").forEach((part) => part.dataset.stage > STAGE && part.remove());
  const on = (id, action) => find(id) && (find(id).onclick = action);
  const restart = () => busy || (newGame(), letAiMove());
  on("reset", restart);
  on("undo", () => step(undo, () => moves.length));
  on("redo", () => step(redo, () => undone.length));
  on("replay", replay);
  for (const id of ["mode", "first"]) if (find(id)) find(id).onchange = restart;
  letAiMove();
}

newGame();
if (typeof document !== "undefined") start();
