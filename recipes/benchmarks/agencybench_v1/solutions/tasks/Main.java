// The task manager of task 2, complete: what each of its five subtasks asks for. All programs share data/tasks.tsv and
// data/users.tsv; every change reads, changes and replaces a file while it holds the lock on data/lock.

import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.nio.channels.FileChannel;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.nio.file.StandardOpenOption;
import java.security.GeneralSecurityException;
import java.security.SecureRandom;
import java.time.LocalDate;
import java.time.LocalDateTime;
import java.time.format.DateTimeParseException;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Base64;
import java.util.Comparator;
import java.util.List;
import java.util.Locale;
import java.util.function.Predicate;
import javax.crypto.SecretKeyFactory;
import javax.crypto.spec.PBEKeySpec;

public class Main {
    static final Path DATA = Path.of("data");
    static final List<String> PRIORITIES = List.of("high", "medium", "low");
    static final String HELP = """
            add TITLE | DESCRIPTION | PRIORITY | DEADLINE | TAG,TAG   (all but the title may be left out)
            list, done ID, delete ID, archive ID, view ID
            /filter priority=high, /filter tag=home, /filter deadline=2030-01-31, /sort deadline, /sort priority
            /search WORD, refresh, logout""";

    // Columns of a task in its file
    static final int ID = 0, OWNER = 1, TITLE = 2, TEXT = 3, CREATED = 4, STATUS = 5, PRIORITY = 6, DEADLINE = 7, TAGS = 8;

    interface Change<T> {
        T apply(List<String[]> rows) throws IOException;
    }

    /** Read a table, change it, and replace its file, alone among all programs. */
    static <T> T change(String name, Change<T> change) throws IOException {
        Files.createDirectories(DATA);
        Path lockFile = DATA.resolve("lock");
        try (var channel = FileChannel.open(lockFile, StandardOpenOption.CREATE, StandardOpenOption.WRITE);
                var lock = channel.lock()) {
            List<String[]> rows = read(name);
            T result = change.apply(rows);
            StringBuilder text = new StringBuilder();
            for (String[] row : rows) {
                text.append(String.join("\t", row)).append("\n");
            }
            Path partial = DATA.resolve(name + ".partial");
            Files.writeString(partial, text);
            Files.move(partial, DATA.resolve(name), StandardCopyOption.ATOMIC_MOVE);
            return result;
        }
    }

    static List<String[]> read(String name) throws IOException {
        List<String[]> rows = new ArrayList<>();
        Path path = DATA.resolve(name);
        if (Files.exists(path)) {
            for (String line : Files.readAllLines(path)) {
                rows.add(line.split("\t", -1));
            }
        }
        return rows;
    }

    static String digest(String salt, String password) {
        try {
            byte[] bytes = salt.getBytes(StandardCharsets.UTF_8);
            var key = new PBEKeySpec(password.toCharArray(), bytes, 20_000, 256);
            byte[] hash = SecretKeyFactory.getInstance("PBKDF2WithHmacSHA256").generateSecret(key).getEncoded();
            return Base64.getEncoder().encodeToString(hash);
        } catch (GeneralSecurityException error) {
            throw new IllegalStateException(error);
        }
    }

    static String register(String name, String password) throws IOException {
        byte[] random = new byte[12];
        new SecureRandom().nextBytes(random);
        String salt = Base64.getEncoder().encodeToString(random);
        return change("users.tsv", rows -> {
            if (!name.matches("[\\w-]+") || password.isEmpty()) {
                return "register NAME PASSWORD, a name of letters and digits";
            }
            if (rows.stream().anyMatch(row -> row[0].equals(name))) {
                return name + " is taken";
            }
            rows.add(new String[] {name, salt, digest(salt, password)});
            return "registered " + name;
        });
    }

    static boolean isRight(String name, String password) throws IOException {
        for (String[] row : read("users.tsv")) {
            if (row[0].equals(name)) {
                return row[2].equals(digest(row[1], password));
            }
        }
        return false;
    }

    static String plain(String text) {
        return text.strip().replace("\t", " ");
    }

    static String add(String user, String rest) throws IOException {
        String[] parts = Arrays.copyOf(rest.split("\\|"), 5);
        for (int i = 0; i < parts.length; i++) {
            parts[i] = parts[i] == null ? "" : plain(parts[i]);
        }
        String priority = parts[2].isEmpty() ? "medium" : parts[2].toLowerCase(Locale.ROOT);
        if (parts[0].isEmpty() || !PRIORITIES.contains(priority)) {
            return "a task needs a title, and a priority High, Medium or Low";
        }
        try {
            LocalDate.parse(parts[3].isEmpty() ? "2030-01-01" : parts[3]);
        } catch (DateTimeParseException error) {
            return "a deadline is a date like 2030-01-31";
        }
        return change("tasks.tsv", rows -> {
            int id = rows.stream().mapToInt(row -> Integer.parseInt(row[ID])).max().orElse(0) + 1;
            String created = LocalDateTime.now().withNano(0).toString();
            rows.add(new String[] {"" + id, user, parts[0], parts[1], created, "Pending", priority, parts[3], parts[4]});
            return "added task " + id;
        });
    }

    static String update(String user, String id, String status) throws IOException {
        return change("tasks.tsv", rows -> {
            for (String[] row : rows) {
                if (row[ID].equals(id) && row[OWNER].equals(user)) {
                    if (status.equals("Archived") && !row[STATUS].equals("Completed")) {
                        return "only a completed task can be archived";
                    }
                    if (status.equals("Deleted")) {
                        rows.remove(row);
                    }
                    row[STATUS] = status;
                    return "task " + id + " is " + status.toLowerCase(Locale.ROOT);
                }
            }
            return "you have no task " + id;
        });
    }

    static String show(String[] row) {
        String deadline = row[DEADLINE].isEmpty() ? "-" : row[DEADLINE];
        return String.format("%3s  %-9s  %-6s  %-10s  %s  %s  [%s]  %s", row[ID], row[STATUS], row[PRIORITY], deadline,
                row[CREATED], row[TITLE], row[TAGS], row[TEXT]);
    }

    static void list(String user, Predicate<String[]> wanted, Comparator<String[]> order) throws IOException {
        List<String[]> rows = new ArrayList<>(read("tasks.tsv"));
        rows.removeIf(row -> !row[OWNER].equals(user) || !wanted.test(row));
        if (order != null) {
            rows.sort(order);
        }
        rows.forEach(row -> System.out.println(show(row)));
        System.out.println(rows.size() + " tasks");
    }

    static boolean isOpen(String[] row) {
        return !row[STATUS].equals("Archived");
    }

    static void filter(String user, String rest) throws IOException {
        String[] pair = Arrays.copyOf(rest.toLowerCase(Locale.ROOT).split("=", 2), 2);
        String value = pair[1] == null ? "" : pair[1].strip();
        list(user, row -> isOpen(row) && switch (pair[0].strip()) {
            case "priority" -> row[PRIORITY].equals(value);
            case "deadline" -> row[DEADLINE].equals(value);
            case "tag", "tags" -> List.of(row[TAGS].toLowerCase(Locale.ROOT).split(" *, *")).contains(value);
            case "status" -> row[STATUS].equalsIgnoreCase(value);
            default -> false;
        }, null);
    }

    static void sort(String user, String key) throws IOException {
        Comparator<String[]> order = switch (key) {
            case "priority" -> Comparator.comparing(row -> PRIORITIES.indexOf(row[PRIORITY]));
            case "tags" -> Comparator.comparing(row -> row[TAGS]);
            default -> Comparator.comparing(row -> row[DEADLINE].isEmpty() ? "9999" : row[DEADLINE]);
        };
        list(user, Main::isOpen, order);
    }

    static void search(String user, String word) throws IOException {
        String wanted = word.toLowerCase(Locale.ROOT);
        list(user, row -> (row[TITLE] + "\n" + row[TEXT]).toLowerCase(Locale.ROOT).contains(wanted), null);
    }

    static void menu(String user, BufferedReader input) throws IOException {
        System.out.println("Welcome, " + user + ".\n" + HELP);
        for (String line; (line = prompt(input)) != null; ) {
            String[] words = Arrays.copyOf(line.strip().split("\\s+", 2), 2);
            String rest = words[1] == null ? "" : words[1].strip();
            switch (words[0]) {
                case "add" -> System.out.println(add(user, rest));
                case "list", "refresh" -> list(user, Main::isOpen, null);
                case "view" -> list(user, row -> row[ID].equals(rest), null);
                case "done" -> System.out.println(update(user, rest, "Completed"));
                case "delete" -> System.out.println(update(user, rest, "Deleted"));
                case "archive" -> System.out.println(update(user, rest, "Archived"));
                case "/filter" -> filter(user, rest);
                case "/sort" -> sort(user, rest);
                case "/search" -> search(user, rest);
                case "logout", "exit" -> {
                    return;
                }
                default -> System.out.println(HELP);
            }
        }
    }

    static String prompt(BufferedReader input) throws IOException {
        System.out.print("> ");
        System.out.flush();
        return input.readLine();
    }

    public static void main(String[] arguments) throws IOException {
        var input = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        if (arguments.length == 2 && arguments[0].equals("--user")) {
            menu(arguments[1], input);
            return;
        }
        System.out.println("Task manager: register NAME PASSWORD, login NAME PASSWORD, exit");
        for (String line; (line = prompt(input)) != null && !line.strip().equals("exit"); ) {
            String[] words = Arrays.copyOf(line.strip().split("\\s+", 3), 3);
            String name = words[1] == null ? "" : words[1];
            String password = words[2] == null ? "" : words[2];
            if ("register".equals(words[0])) {
                System.out.println(register(name, password));
            } else if ("login".equals(words[0]) && isRight(name, password)) {
                menu(name, input);
            } else {
                System.out.println("wrong name or password");
            }
        }
    }
}
