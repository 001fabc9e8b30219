// The chat system of task 1, complete: what each of its five subtasks asks for. Data lie below data/, a folder a user.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <unistd.h>

namespace fs = std::filesystem;
using std::string;

const fs::path DATA = "data";
const int PAGE = 10;  // messages of a page of /history
const std::vector<string> REPLIES = {"Hello!", "I see.", "Tell me more.", "That is good to hear.", "Until later."};

string lower(string text) {
    std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return std::tolower(c); });
    return text;
}

bool is_name(const string& name) {
    auto good = [](unsigned char c) { return std::isalnum(c) || c == '_' || c == '-'; };
    return !name.empty() && std::all_of(name.begin(), name.end(), good);
}

string digest(const string& name, const string& password) {  // salted and stretched; no library brings better
    size_t value = std::hash<string>{}(name + "\n" + password);
    for (int i = 0; i < 10000; i++) value = std::hash<string>{}(name + std::to_string(value));
    return std::to_string(value);
}

// A file that is either the old or the new one, whatever happens in between.
void write_whole(const fs::path& path, const string& text) {
    fs::create_directories(path.parent_path());
    fs::path partial = path;
    partial += ".partial";
    std::ofstream(partial) << text;
    fs::rename(partial, path);
}

// One line in one write(), and on the disk before we go on: nothing is lost or cut when the program is killed.
void append_line(const fs::path& path, const string& line) {
    fs::create_directories(path.parent_path());
    int file = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0644);
    string whole = line + "\n";
    if (write(file, whole.data(), whole.size()) != (ssize_t)whole.size()) std::cerr << "cannot write " << path << "\n";
    fsync(file);
    close(file);
}

std::vector<string> read_lines(const fs::path& path) {
    std::ifstream file(path);
    std::vector<string> lines;
    for (string line; std::getline(file, line);) lines.push_back(line);
    return lines;
}

std::map<string, string> read_pairs(const fs::path& path) {
    std::map<string, string> pairs;
    for (const string& line : read_lines(path)) {
        size_t tab = line.find('\t');
        pairs[line.substr(0, tab)] = tab == string::npos ? "" : line.substr(tab + 1);
    }
    return pairs;
}

void write_pairs(const fs::path& path, const std::map<string, string>& pairs) {
    std::ostringstream text;
    for (const auto& [key, value] : pairs) text << key << '\t' << value << '\n';
    write_whole(path, text.str());
}

struct Message {
    string friend_name, from, text;
};

// Everybody puts messages in; one thread takes them out and writes them: none is lost, none overtakes another.
class Queue {
    std::deque<Message> waiting;
    std::mutex lock;
    std::condition_variable changed;
    bool ended = false;

public:
    void put(Message message) {
        std::lock_guard<std::mutex> hold(lock);
        waiting.push_back(std::move(message));
        changed.notify_one();
    }
    bool take(Message& message) {
        std::unique_lock<std::mutex> hold(lock);
        changed.wait(hold, [this] { return ended || !waiting.empty(); });
        if (waiting.empty()) return false;
        message = std::move(waiting.front());
        waiting.pop_front();
        return true;
    }
    void end() {
        std::lock_guard<std::mutex> hold(lock);
        ended = true;
        changed.notify_all();
    }
};

class Chat {
    string user, open_friend;  // of the chat on the screen
    fs::path home;
    std::map<string, string> friends;  // name -> alias, "" for none
    Queue queue;
    std::thread writer;
    std::map<string, std::thread> others;
    std::map<string, std::shared_ptr<std::atomic<bool>>> running;
    std::mutex screen, files;

    fs::path history(const string& name) { return home / "history" / (name + ".txt"); }
    string shown(const string& name) { return friends[name].empty() ? name : friends[name]; }
    bool online(const string& name) { return fs::exists(DATA / "online" / name) || running.count(name); }

    void write_messages() {
        for (Message message; queue.take(message);) {
            std::scoped_lock hold(files, screen);
            append_line(history(message.friend_name), message.from + ": " + message.text);
            if (message.friend_name != open_friend) continue;
            std::cout << "[" << (message.from == user ? user : shown(message.from)) << "] " << message.text << std::endl;
        }
    }

    // A friend who writes now and then, in a thread of its own.
    void simulate(const string& name, std::shared_ptr<std::atomic<bool>> go_on) {
        for (int n = 1; *go_on; n++) {
            for (int i = 0; i < 30 && *go_on; i++) std::this_thread::sleep_for(std::chrono::milliseconds(100));
            if (*go_on) queue.put({name, name, "automatic message " + std::to_string(n)});
        }
    }

    void start(const string& name) {
        auto go_on = std::make_shared<std::atomic<bool>>(true);
        running[name] = go_on;
        others[name] = std::thread([this, name, go_on] { simulate(name, go_on); });
    }

    void stop(const string& name) {
        *running[name] = false;
        others[name].join();
        others.erase(name);
        running.erase(name);
    }

    void show_history(const string& name, int page) {
        std::scoped_lock hold(files, screen);
        auto lines = read_lines(history(name));
        int pages = std::max(1, ((int)lines.size() + PAGE - 1) / PAGE);
        page = std::clamp(page, 1, pages);
        std::cout << "-- history of " << shown(name) << ", page " << page << " of " << pages << "\n";
        for (int n = (page - 1) * PAGE; n < std::min((int)lines.size(), page * PAGE); n++) std::cout << lines[n] << "\n";
    }

    void search(const string& word) {
        std::scoped_lock hold(files, screen);
        int found = 0;
        for (const auto& [name, alias] : friends) {
            for (const string& line : read_lines(history(name))) {
                size_t at = lower(line).find(lower(word));
                if (word.empty() || at == string::npos) continue;
                string marked = line.substr(0, at) + "**" + line.substr(at, word.size()) + "**" + line.substr(at + word.size());
                std::cout << "(" << shown(name) << ") " << marked << "\n";
                found++;
            }
        }
        std::cout << found << " messages found\n";
    }

    void chat(const string& name) {
        open_friend = name;
        std::cout << "Chat with " << shown(name) << ": type a message, /history [PAGE], /search WORD, /back\n";
        size_t sent = read_lines(history(name)).size();
        for (string line; std::getline(std::cin, line);) {
            std::istringstream words(line);
            string command, rest;
            words >> command;
            std::getline(words >> std::ws, rest);
            if (command == "/back") break;
            if (command == "/history") {
                settle();
                show_history(name, std::atoi(rest.c_str()));
            } else if (command == "/search") {
                settle();
                search(rest);
            } else if (!line.empty()) {
                queue.put({name, user, line});
                queue.put({name, name, REPLIES[sent++ % REPLIES.size()]});
            }
        }
        settle();
        open_friend = "";
    }

    void settle() { std::this_thread::sleep_for(std::chrono::milliseconds(200)); }  // until the writer is through

    void list() {
        if (friends.empty()) std::cout << "no friends yet\n";
        for (const auto& [name, alias] : friends) std::cout << shown(name) << (online(name) ? " (online)\n" : " (offline)\n");
    }

public:
    explicit Chat(const string& name) : user(name), home(DATA / name), friends(read_pairs(home / "friends.txt")) {
        write_whole(DATA / "online" / user, "");
        writer = std::thread([this] { write_messages(); });
        for (const auto& [other, alias] : friends) start(other);
    }
    ~Chat() {
        while (!others.empty()) stop(others.begin()->first);
        queue.end();
        writer.join();
        fs::remove(DATA / "online" / user);
    }

    void run() {
        string help = "Menu: add NAME, remove NAME, list, chat NAME, alias NAME ALIAS, /search WORD, help, logout\n";
        std::cout << "Welcome, " << user << ".\n" << help;
        for (string line; std::cout << "> " << std::flush, std::getline(std::cin, line);) {
            std::istringstream words(line);
            string command, name, rest;
            words >> command;
            if (command == "/search") {
                std::getline(words >> std::ws, rest);
                search(rest);
                continue;
            }
            words >> name;
            std::getline(words >> std::ws, rest);
            for (const auto& [other, alias] : friends) if (!alias.empty() && alias == name) name = other;
            bool known = friends.count(name);
            if (command == "logout") break;
            if (command == "list") list();
            else if (command == "add" && is_name(name) && !known) friends[name] = "", start(name), std::cout << "added\n";
            else if (command == "remove" && known) stop(name), friends.erase(name), std::cout << "removed\n";
            else if (command == "chat" && known) chat(name);
            else if (command == "alias" && known) friends[name] = rest, std::cout << name << " is shown as " << shown(name) << "\n";
            else std::cout << (command == "help" ? "" : "That does not work. ") << help;
            write_pairs(home / "friends.txt", friends);
        }
    }
};

int main() {
    std::cout << "Chat system: register NAME PASSWORD, login NAME PASSWORD, exit\n";
    for (string line; std::cout << "> " << std::flush, std::getline(std::cin, line);) {
        std::istringstream words(line);
        string command, name, password;
        words >> command >> name >> password;
        auto users = read_pairs(DATA / "users.txt");
        if (command == "exit") break;
        if (command == "register" && is_name(name) && !password.empty() && !users.count(name)) {
            users[name] = digest(name, password);
            write_pairs(DATA / "users.txt", users);
            std::cout << "registered " << name << "\n";
        } else if (command == "login" && users.count(name) && users[name] == digest(name, password)) {
            Chat(name).run();
        } else {
            std::cout << (command == "login" ? "wrong name or password\n" : "register NAME PASSWORD, login NAME PASSWORD, exit\n");
        }
    }
}
