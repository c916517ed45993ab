package peers;

import static io.a2a.util.Utils.OBJECT_MAPPER;

import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.lang.reflect.Field;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;

import com.fasterxml.jackson.databind.JsonNode;
import io.a2a.A2A;
import io.a2a.client.Client;
import io.a2a.client.ClientEvent;
import io.a2a.client.MessageEvent;
import io.a2a.client.TaskEvent;
import io.a2a.client.TaskUpdateEvent;
import io.a2a.client.config.ClientConfig;
import io.a2a.spec.AgentCard;
import io.a2a.spec.DeleteTaskPushNotificationConfigParams;
import io.a2a.spec.GetTaskPushNotificationConfigParams;
import io.a2a.spec.JSONRPCError;
import io.a2a.spec.ListTaskPushNotificationConfigParams;
import io.a2a.spec.Message;
import io.a2a.spec.PushNotificationConfig;
import io.a2a.spec.TaskIdParams;
import io.a2a.spec.TaskPushNotificationConfig;
import io.a2a.spec.TaskQueryParams;
import io.a2a.spec.TextPart;
import org.apache.rocketmq.a2a.common.uitl.RocketMQUtil;
import org.apache.rocketmq.a2a.transport.config.RocketMQTransportConfig;
import org.apache.rocketmq.a2a.transport.impl.RocketMQTransport;

/**
 * The reference's client, driven by lines of JSON on standard input; each is answered by one line on standard output:
 * `{"result": …}`, or `{"error": {"type", "message", "code"}}`. The first one tells what to call:
 * `{"op": "connect", "card", "replyTopic", "replyGroup", "liteTopic"}`, the card as JSON or as URL.
 */
public class Caller {
    private static final Object END = new Object();

    private final ExecutorService calls = Executors.newCachedThreadPool();
    private final Map<String, BlockingQueue<Object>> streams = new ConcurrentHashMap<>();
    private RocketMQTransportConfig transportConfig;
    private AgentCard card;
    private Client unary;
    private Client streaming;

    public static void main(String[] arguments) throws Exception {
        PrintStream answers = new PrintStream(System.out, true, StandardCharsets.UTF_8);
        System.setOut(System.err);
        BufferedReader lines = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        Caller caller = new Caller();
        for (String line = lines.readLine(); line != null; line = lines.readLine()) {
            answers.println(OBJECT_MAPPER.writeValueAsString(caller.answer(OBJECT_MAPPER.readTree(line))));
        }
        Runtime.getRuntime().halt(0);
    }

    /** Carry out one line within its time; the reference itself waits two minutes for an answer that it has missed. */
    private Map<String, Object> answer(JsonNode line) throws Exception {
        Future<Object> call = calls.submit(() -> carryOut(line));
        Map<String, Object> answer = new LinkedHashMap<>();
        try {
            answer.put("result", call.get(line.path("seconds").asLong(60), TimeUnit.SECONDS));
        } catch (TimeoutException late) {
            call.cancel(true);
            answer.put("error", Map.of("type", "Timeout", "message", "no answer"));
        } catch (java.util.concurrent.ExecutionException failed) {
            answer.put("error", describe(failed.getCause()));
        }
        return answer;
    }

    private Object carryOut(JsonNode line) throws Exception {
        String id = line.path("id").asText(null);
        String config = line.path("config").asText(null);
        return switch (line.path("op").asText()) {
            case "connect" -> connect(line);
            case "send" -> send(line);
            case "stream" -> stream(line);
            case "events" -> events(line);
            case "streamed" -> {
                stream(line);
                yield events(line);
            }
            case "get" -> unary.getTask(new TaskQueryParams(id, line.path("historyLength").asInt(0)), null);
            case "cancel" -> unary.cancelTask(new TaskIdParams(id), null);
            case "receipt" -> receipt(id, line.path("kept").asBoolean());
            case "pushSet" -> unary.setTaskPushNotificationConfiguration(
                new TaskPushNotificationConfig(id,
                    new PushNotificationConfig.Builder().id(config).url(line.path("url").asText()).build()), null);
            case "pushGet" -> unary.getTaskPushNotificationConfiguration(
                new GetTaskPushNotificationConfigParams(id, config), null);
            case "pushList" -> unary.listTaskPushNotificationConfigurations(
                new ListTaskPushNotificationConfigParams(id), null);
            case "pushDelete" -> {
                unary.deleteTaskPushNotificationConfigurations(
                    new DeleteTaskPushNotificationConfigParams(id, config), null);
                yield null;
            }
            case "extendedCard" -> extendedCard();
            default -> throw new IllegalArgumentException("unknown op in " + line);
        };
    }

    private AgentCard connect(JsonNode line) throws Exception {
        JsonNode given = line.get("card");
        card = given.isTextual()
            ? A2A.getAgentCard(given.asText())
            : OBJECT_MAPPER.treeToValue(given, AgentCard.class);
        transportConfig = new RocketMQTransportConfig.Builder()
            .accessKey("")  // refuses to be left out, also where the cluster asks for none
            .secretKey("")
            .workAgentResponseTopic(line.path("replyTopic").asText())
            .workAgentResponseGroupID(line.path("replyGroup").asText())
            .liteTopic(line.path("liteTopic").asText())
            .build();
        unary = client(false);
        streaming = client(true);
        return card;
    }

    private Client client(boolean stream) throws Exception {
        return Client.builder(card)
            .clientConfig(new ClientConfig.Builder().setStreaming(stream).setUseClientPreference(true).build())
            .withTransport(RocketMQTransport.class, transportConfig)
            .build();
    }

    private static Message message(JsonNode line) {
        return new Message.Builder()
            .role(Message.Role.USER)
            .parts(List.of(new TextPart(line.path("text").asText())))
            .contextId(line.path("contextId").asText(null))
            .taskId(line.path("taskId").asText(null))
            .build();
    }

    private Object send(JsonNode line) throws Exception {
        List<Object> got = new ArrayList<>();
        unary.sendMessage(message(line), List.of((event, unused) -> got.add(plain(event))), null, null);
        return got.get(0);
    }

    private Object stream(JsonNode line) throws Exception {
        BlockingQueue<Object> events = new LinkedBlockingQueue<>();
        streams.put(line.path("name").asText(), events);
        streaming.sendMessage(
            message(line),
            List.of((event, unused) -> {
                Object plain = plain(event);
                events.add(plain);
                if (isLast(OBJECT_MAPPER.valueToTree(plain))) {
                    events.add(END);
                }
            }),
            error -> {
                events.add(Map.of("error", describe(error)));
                events.add(END);
            },
            null);
        return null;
    }

    /** What came of a stream up to its end, or up to an event that has `until` in it. */
    private Object events(JsonNode line) throws Exception {
        String until = line.path("until").asText(null);
        List<Object> got = new ArrayList<>();
        while (true) {
            Object event = streams.get(line.path("name").asText()).take();
            if (event == END) {
                return got;
            }
            got.add(event);
            if (until != null && OBJECT_MAPPER.writeValueAsString(event).contains(until)) {
                return got;
            }
        }
    }

    /** What names the instance that runs a task, once it is kept, or dropped: that comes after the answer itself. */
    private static Object receipt(String taskId, boolean kept) throws InterruptedException {
        while (RocketMQUtil.TASK_SERVER_RECEIPT_MAP.containsKey(taskId) != kept) {
            Thread.sleep(10);
        }
        return RocketMQUtil.TASK_SERVER_RECEIPT_MAP.get(taskId);
    }

    private static boolean isLast(JsonNode event) {
        return event.path("final").asBoolean() || event.path("kind").asText().equals("message");
    }

    private static Object plain(ClientEvent event) {
        if (event instanceof TaskUpdateEvent update) {
            return update.getUpdateEvent();
        }
        return event instanceof TaskEvent task ? task.getTask() : ((MessageEvent) event).getMessage();
    }

    /** No way through the reference's own doors: it asks only when it has no card, and refuses to be made without one. */
    private AgentCard extendedCard() throws Exception {
        RocketMQTransport transport = new RocketMQTransport(transportConfig, card);
        Field needed = RocketMQTransport.class.getDeclaredField("needsExtendedCard");
        needed.setAccessible(true);
        needed.setBoolean(transport, true);
        return transport.getAgentCard(null);
    }

    private static Map<String, Object> describe(Throwable error) {
        Map<String, Object> described = new LinkedHashMap<>();
        Throwable root = error;
        while (root.getCause() != null && !(root instanceof JSONRPCError)) {
            root = root.getCause();
        }
        described.put("type", root.getClass().getSimpleName());
        described.put("message", String.valueOf(root.getMessage()));
        if (root instanceof JSONRPCError rpc) {
            described.put("code", rpc.getCode());
        }
        return described;
    }
}
