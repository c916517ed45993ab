package peers;

import static org.apache.rocketmq.a2a.common.constant.RocketMQA2AConstant.ROCKETMQ_PROTOCOL;
import static org.apache.rocketmq.a2a.common.uitl.RocketMQUtil.formatRocketMQServiceUrl;

import java.util.List;

import io.a2a.server.ExtendedAgentCard;
import io.a2a.server.PublicAgentCard;
import io.a2a.spec.AgentCapabilities;
import io.a2a.spec.AgentCard;
import io.a2a.spec.AgentInterface;
import io.a2a.spec.AgentSkill;
import jakarta.enterprise.context.ApplicationScoped;
import jakarta.enterprise.inject.Produces;

/** The server's cards, made from the properties that the reference's routes read. */
@ApplicationScoped
public class Cards {
    @Produces
    @PublicAgentCard
    public AgentCard card() {
        return card("A Java agent under test.");
    }

    @Produces
    @ExtendedAgentCard
    public AgentCard extendedCard() {
        return card("For those who may know more.");
    }

    private static AgentCard card(String description) {
        String url = formatRocketMQServiceUrl(
            System.getProperty("rocketMQEndpoint"),
            System.getProperty("rocketMQNamespace", ""),
            System.getProperty("bizTopic"));
        return new AgentCard.Builder()
            .name(System.getProperty("peer.name", "java"))
            .description(description)
            .version("1")
            .protocolVersion("0.3.0")
            .url(url)
            .preferredTransport(ROCKETMQ_PROTOCOL)
            .additionalInterfaces(List.of(new AgentInterface(ROCKETMQ_PROTOCOL, url)))
            .capabilities(new AgentCapabilities.Builder().streaming(true).pushNotifications(true).build())
            .supportsAuthenticatedExtendedCard(true)
            .defaultInputModes(List.of("text/plain"))
            .defaultOutputModes(List.of("text/plain"))
            .skills(List.of(new AgentSkill.Builder()
                .id("test").name("test").description("Is tested.").tags(List.of("test")).build()))
            .build();
    }
}
