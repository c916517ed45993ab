package clients;

import com.google.gson.Gson;
import com.google.gson.GsonBuilder;
import com.google.gson.JsonObject;
import java.io.BufferedReader;
import java.io.Closeable;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Deque;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.ConcurrentHashMap;
import org.apache.rocketmq.client.apis.ClientConfiguration;
import org.apache.rocketmq.client.apis.ClientException;
import org.apache.rocketmq.client.apis.ClientServiceProvider;
import org.apache.rocketmq.client.apis.consumer.ConsumeResult;
import org.apache.rocketmq.client.apis.consumer.FilterExpression;
import org.apache.rocketmq.client.apis.consumer.LitePushConsumer;
import org.apache.rocketmq.client.apis.consumer.OffsetOption;
import org.apache.rocketmq.client.apis.consumer.SimpleConsumer;
import org.apache.rocketmq.client.apis.message.MessageBuilder;
import org.apache.rocketmq.client.apis.message.MessageView;
import org.apache.rocketmq.client.apis.producer.Producer;
import org.apache.rocketmq.client.apis.producer.SendReceipt;
import org.apache.rocketmq.client.apis.producer.Transaction;
import org.apache.rocketmq.client.apis.producer.TransactionResolution;

/** The official Java client behind a pipe: one command a line in, one answer or event a line out, as JSON. */
public final class OfficialClient {
    private static final Gson GSON = new GsonBuilder().serializeNulls().create();

    private final PrintStream output = new PrintStream(System.out, true, StandardCharsets.UTF_8);
    private final ClientServiceProvider provider = ClientServiceProvider.loadService();
    private final ClientConfiguration configuration;
    private final Deque<Closeable> started = new ArrayDeque<>();
    private final Map<String, MessageView> received = new ConcurrentHashMap<>();
    private final Map<String, Integer> failures = new ConcurrentHashMap<>();
    private Producer producer;
    private SimpleConsumer simpleConsumer;
    private LitePushConsumer liteConsumer;

    private OfficialClient(String endpoint) {
        configuration = ClientConfiguration.newBuilder().setEndpoints(endpoint).enableSsl(false).build();
    }

    public static void main(String[] arguments) throws IOException {
        OfficialClient client = new OfficialClient(arguments[0]);
        BufferedReader input = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        for (String line = input.readLine(); line != null; line = input.readLine()) {
            try {
                Object answer = client.execute(GSON.fromJson(line, JsonObject.class));
                client.say("answer", answer == null ? "" : answer);
            } catch (Exception error) {
                client.say("error", error.toString());
            }
        }
        // Threads of the client that are no daemons must not keep the process.
        System.exit(0);
    }

    private synchronized void say(String kind, Object what) {
        output.println(GSON.toJson(Map.of(kind, what)));
    }

    private Object execute(JsonObject command) throws ClientException, IOException {
        switch (text(command, "do")) {
            case "producer_of":
                producer = provider.newProducerBuilder()
                    .setClientConfiguration(configuration)
                    .setTopics(text(command, "topic"))
                    .setTransactionChecker(message -> TransactionResolution.ROLLBACK)
                    .build();
                started.push(producer);
                return null;
            case "send":
                return send(command);
            case "simple":
                simpleConsumer = provider.newSimpleConsumerBuilder()
                    .setClientConfiguration(configuration)
                    .setConsumerGroup(text(command, "group"))
                    .setAwaitDuration(Duration.ofSeconds(5))
                    .setSubscriptionExpressions(subscription(command))
                    .build();
                started.push(simpleConsumer);
                return null;
            case "receive":
                return receive(command.get("count").getAsInt());
            case "ack":
                simpleConsumer.ack(received.get(text(command, "message_id")));
                return null;
            case "hide":
                simpleConsumer.changeInvisibleDuration(
                    received.get(text(command, "message_id")),
                    Duration.ofSeconds(command.get("seconds").getAsLong()));
                return null;
            case "push":
                started.push(provider.newPushConsumerBuilder()
                    .setClientConfiguration(configuration)
                    .setConsumerGroup(text(command, "group"))
                    .setSubscriptionExpressions(subscription(command))
                    .setMessageListener(this::consume)
                    .build());
                return null;
            case "lite":
                liteConsumer = provider.newLitePushConsumerBuilder()
                    .setClientConfiguration(configuration)
                    .setConsumerGroup(text(command, "group"))
                    .bindTopic(text(command, "topic"))
                    .setMessageListener(this::consume)
                    .build();
                started.push(liteConsumer);
                return null;
            case "subscribe":
                if (command.has("offset")) {
                    OffsetOption option = OffsetOption.ofOffset(command.get("offset").getAsLong());
                    liteConsumer.subscribeLite(text(command, "name"), option);
                } else {
                    liteConsumer.subscribeLite(text(command, "name"));
                }
                return null;
            case "unsubscribe":
                liteConsumer.unsubscribeLite(text(command, "name"));
                return null;
            case "close":
                while (!started.isEmpty()) {
                    started.pop().close();
                }
                return null;
            default:
                throw new IllegalArgumentException("unknown command " + command);
        }
    }

    private String send(JsonObject command) throws ClientException {
        MessageBuilder builder = provider.newMessageBuilder()
            .setTopic(text(command, "topic"))
            .setBody(text(command, "body").getBytes(StandardCharsets.UTF_8));
        if (command.has("tag")) {
            builder.setTag(text(command, "tag"));
        }
        if (command.has("key")) {
            builder.setKeys(text(command, "key"));
        }
        if (command.has("properties")) {
            JsonObject properties = command.getAsJsonObject("properties");
            properties.keySet().forEach(name -> builder.addProperty(name, text(properties, name)));
        }
        if (command.has("message_group")) {
            builder.setMessageGroup(text(command, "message_group"));
        }
        if (command.has("lite_topic")) {
            builder.setLiteTopic(text(command, "lite_topic"));
        }
        if (command.has("priority")) {
            builder.setPriority(command.get("priority").getAsInt());
        }
        if (command.has("delay")) {
            builder.setDeliveryTimestamp(System.currentTimeMillis() + 1000 * command.get("delay").getAsLong());
        }
        if (!command.has("transaction")) {
            return producer.send(builder.build()).getMessageId().toString();
        }
        Transaction transaction = producer.beginTransaction();
        SendReceipt receipt = producer.send(builder.build(), transaction);
        transaction.commit();
        return receipt.getMessageId().toString();
    }

    private List<Map<String, Object>> receive(int count) throws ClientException {
        List<Map<String, Object>> messages = new ArrayList<>();
        for (MessageView message : simpleConsumer.receive(count, Duration.ofSeconds(30))) {
            received.put(message.getMessageId().toString(), message);
            messages.add(described(message));
        }
        return messages;
    }

    /** Says what comes; fails as often with a message as its property "fail" says. */
    private ConsumeResult consume(MessageView message) {
        String id = message.getMessageId().toString();
        int failed = failures.getOrDefault(id, 0);
        boolean fails = failed < Integer.parseInt(message.getProperties().getOrDefault("fail", "0"));
        failures.put(id, failed + (fails ? 1 : 0));
        say("event", described(message));
        return fails ? ConsumeResult.FAILURE : ConsumeResult.SUCCESS;
    }

    private static Map<String, Object> described(MessageView message) {
        Map<String, Object> described = new LinkedHashMap<>();
        described.put("id", message.getMessageId().toString());
        described.put("topic", message.getTopic());
        described.put("body", StandardCharsets.UTF_8.decode(message.getBody()).toString());
        described.put("tag", message.getTag().orElse(null));
        described.put("keys", message.getKeys());
        described.put("properties", message.getProperties());
        described.put("message_group", message.getMessageGroup().orElse(null));
        described.put("lite_topic", message.getLiteTopic().orElse(null));
        described.put("attempt", message.getDeliveryAttempt());
        return described;
    }

    private static Map<String, FilterExpression> subscription(JsonObject command) {
        FilterExpression expression =
            command.has("tag") ? new FilterExpression(text(command, "tag")) : FilterExpression.SUB_ALL;
        return Map.of(text(command, "topic"), expression);
    }

    private static String text(JsonObject command, String name) {
        return command.get(name).getAsString();
    }
}
