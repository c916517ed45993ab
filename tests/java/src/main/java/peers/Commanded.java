package peers;

import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.Map;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;

import io.a2a.server.agentexecution.AgentExecutor;
import io.a2a.server.agentexecution.RequestContext;
import io.a2a.server.events.EventQueue;
import io.a2a.server.tasks.TaskUpdater;
import io.a2a.spec.InternalError;
import io.a2a.spec.Part;
import io.a2a.spec.TextPart;
import jakarta.enterprise.context.ApplicationScoped;

/**
 * Does what the message says: `count N`, `raise TEXT`, `fail TEXT`, `message TEXT`, `ask`, `wait NAME` (until another
 * message says `open NAME`), `tick NAME` (as often as it takes). Anything else is answered with the lines of the file that the property `peer.answer`
 * names, the message in the place of `{asked}`, else echoed.
 */
@ApplicationScoped
public class Commanded implements AgentExecutor {
    private static final long LONGEST_WAIT_MILLISECONDS = 120_000;
    private static final long TICK_MILLISECONDS = 50;
    private static final int MOST_TICKS = 1000;

    private final Map<String, CountDownLatch> gates = new ConcurrentHashMap<>();
    private final Map<String, String> waiting = new ConcurrentHashMap<>();

    @Override
    public void execute(RequestContext context, EventQueue queue) {
        String text = context.getUserInput("");
        String command = text.split(" ", 2)[0];
        String rest = text.substring(command.length()).trim();
        TaskUpdater updater = new TaskUpdater(context, queue);
        if (command.equals("message")) {
            queue.enqueueEvent(updater.newAgentMessage(List.of(new TextPart(rest)), null));
            return;
        }
        if (context.getTask() == null) {
            updater.submit();
        }
        updater.startWork();
        switch (command) {
            case "count" -> {
                int count = Integer.parseInt(rest);
                for (int number = 0; number < count; number++) {
                    say(updater, number + ",", number, number == count - 1);
                }
                updater.complete();
            }
            case "raise" -> throw new InternalError(rest);
            case "fail" -> updater.fail(updater.newAgentMessage(List.of(new TextPart(rest)), null));
            case "ask" -> updater.requiresInput(true);
            case "open" -> {
                gate(rest).countDown();
                updater.complete();
            }
            case "tick" -> {
                int ticks = 0;
                do {
                    say(updater, "tick", ticks, false);
                    ticks++;
                } while (ticks < MOST_TICKS && !opened(rest, TICK_MILLISECONDS));
                say(updater, "end", ticks, true);
                updater.complete();
            }
            case "wait" -> {
                say(updater, "begin ", 0, false);
                waiting.put(context.getTaskId(), rest);
                if (opened(rest, LONGEST_WAIT_MILLISECONDS) && waiting.remove(context.getTaskId()) != null) {
                    say(updater, "end", 1, true);
                    updater.complete();
                }
            }
            default -> {
                List<String> lines = answer(text);
                for (int number = 0; number < lines.size(); number++) {
                    say(updater, lines.get(number), number, number == lines.size() - 1);
                }
                updater.complete();
            }
        }
    }

    @Override
    public void cancel(RequestContext context, EventQueue queue) {
        new TaskUpdater(context, queue).cancel();
        String gate = waiting.remove(context.getTaskId());
        if (gate != null) {
            gate(gate).countDown();
        }
    }

    private static void say(TaskUpdater updater, String text, int number, boolean last) {
        List<Part<?>> parts = List.of(new TextPart(text));
        updater.addArtifact(parts, "answer", null, null, number > 0, last);
    }

    private CountDownLatch gate(String name) {
        return gates.computeIfAbsent(name, unused -> new CountDownLatch(1));
    }

    private boolean opened(String name, long milliseconds) {
        try {
            return gate(name).await(milliseconds, TimeUnit.MILLISECONDS);
        } catch (InterruptedException interrupted) {
            return false;
        }
    }

    private static List<String> answer(String text) {
        String file = System.getProperty("peer.answer");
        if (file == null) {
            return List.of("said ", text);
        }
        try {
            return Files.readAllLines(Path.of(file)).stream()
                .map(line -> line.replace("{asked}", text) + "\n")
                .toList();
        } catch (IOException unreadable) {
            throw new UncheckedIOException(unreadable);
        }
    }
}
