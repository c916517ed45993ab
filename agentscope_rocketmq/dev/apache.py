"""A real Apache RocketMQ on this machine, for development and tests, without Docker.

Name server, broker and proxy (cluster mode, the one that serves LiteTopics) run as Java processes that listen on
127.0.0.1 where RocketMQ lets one choose, on ports the kernel chooses. It needs Java; Maven fetches the jars once.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Self

from agentscope_rocketmq.config import RocketMQConfig
from agentscope_rocketmq.dev.folders import file_lock, temporary_folder
from agentscope_rocketmq.dev.maven import rocketmq_jars
from agentscope_rocketmq.dev.ports import Ports
from agentscope_rocketmq.dev.process import Process, Starter
from agentscope_rocketmq.dev.readiness import broker_answers, lite_topic_answers, wait_until
from agentscope_rocketmq.errors import BrokerError, BrokerUnreachable, ClosedError, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["ApacheRocketMQ"]

START_TIMEOUT = 180.0
"""Seconds until everything must answer; some 7 s on an idle machine with two cores."""

STOP_TIMEOUT = 40.0
"""Seconds that the broker may take to end by itself, flushing its store; some 12 s when idle."""

PROXY_STARTS = 3
"""How often the proxy is started when it ends while it starts."""

_CLUSTER = "DefaultCluster"
_BROKER = "broker-a"
_LOCALHOST = "127.0.0.1"
# The broker's second server ("fast remoting") listens this much below its first; that can't be set.
_FAST_PORT_BELOW = 2

_BROKER_OPTIONS = {
    "brokerClusterName": _CLUSTER,
    "brokerName": _BROKER,
    "brokerIP1": _LOCALHOST,
    "brokerIP2": _LOCALHOST,
    "bindAddress": _LOCALHOST,
    # LiteTopics live in these.
    "enableLmq": "true",
    "enableMultiDispatch": "true",
    # What was not provisioned is an error, as in production, not something that springs up with other attributes.
    "autoCreateTopicEnable": "false",
    "autoCreateSubscriptionGroup": "false",
    "mappedFileSizeCommitLog": str(64 * 1024 * 1024),
    # The least that is accepted: how soon a broker tries again that found no name server at its start.
    "registerNameServerPeriod": "10000",
    # 5.5.0 spins on one core until this is over for the first time, 10 s unless set (TransactionMetricsFlushService).
    "transactionMetricFlushInterval": "500",
    # Each flush copies the whole 38 MB of the timer wheel.
    "timerFlushIntervalMs": "10000",
}
_PROXY_OPTIONS: Mapping[str, object] = {"rocketMQClusterName": _CLUSTER, "proxyMode": "CLUSTER"}

# The quick compiler alone: a third less work at the start, which is what tests and demos wait for.
_JAVA_OPTIONS = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xss512k", "-Djava.net.preferIPv4Stack=true")
# Otherwise each of the three makes up a certificate at its start, which takes seconds.
_PLAINTEXT = ("-Dtls.server.mode=disabled",)
_PLAINTEXT_OR_TLS = (
    # The official Java client speaks TLS unless its program says otherwise, and rocketmq-a2a never does.
    "-Dtls.server.mode=permissive",
    # A short key is made up quickly, and nobody trusts that certificate anyway.
    "-Dio.grpc.netty.shaded.io.netty.handler.ssl.util.selfSignedKeyStrength=1024",
    "-Dio.netty.handler.ssl.util.selfSignedKeyStrength=1024",
)
_HEAP = {"nameserver": "128m", "broker": "768m", "proxy": "768m"}
_MAIN_CLASS = {
    "nameserver": "org.apache.rocketmq.namesrv.NamesrvStartup",
    "broker": "org.apache.rocketmq.broker.BrokerStartup",
    "proxy": "org.apache.rocketmq.proxy.ProxyStartup",
}
_BROKER_JAVA_OPTIONS = (
    # A laptop's disk is often fuller than the 90 % at which a broker refuses to write.
    "-Drocketmq.broker.diskSpaceWarningLevelRatio=0.99",
    "-Drocketmq.broker.diskSpaceCleanForciblyRatio=0.98",
)


class ApacheRocketMQ:
    """A name server, a broker and a proxy of Apache RocketMQ 5.5.0. Use it as a (plain) context manager.

    Its methods block, seconds long: call them in a thread where an event loop runs. On Linux its processes are killed
    with the program that started them, whatever that one dies of.

    Args:
        port: Port of the proxy's gRPC endpoint; 0 lets the kernel choose.
        namesrv_port: Port of the name server; 0 lets the kernel choose.
        data: Folder for store, settings and logs, made if need be; what is in it is there again at the next start.
            None takes a temporary folder that is removed at the stop; after a kill -9, at the next start of another.
        cache: Folder for the jars, about 100 MB; None takes the user's cache folder (`XDG_CACHE_HOME` is honoured).
        broker_options: More lines of broker.conf; they win over the launcher's.
        proxy_options: More entries of rmq-proxy.json; they win over the launcher's.
        java_options: More options of the three Java machines; they win over the launcher's, which are made for a quick
            start (`-XX:TieredStopAtLevel=4` is better for measurements of throughput).
        authentication: Access key and secret key of a super user; calls that are not signed by it are refused. None
            lets everybody in.
        tls: PEM files of certificate and key that the endpoint serves; plaintext is still answered on the same port,
            as is RocketMQ's default. None makes up a certificate, for clients that take any, as the Java one does.
        on_progress: Told in one line what is going on when it takes long.

    Attributes:
        endpoint: `127.0.0.1:PORT` of the proxy's gRPC endpoint.
        namesrv: `127.0.0.1:PORT` of the name server, for provisioning.
        broker_address: `127.0.0.1:PORT` of the broker, as `mqadmin -b` wants it.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        namesrv_port: int = 0,
        data: Path | None = None,
        cache: Path | None = None,
        broker_options: Mapping[str, str] | None = None,
        proxy_options: Mapping[str, object] | None = None,
        java_options: Sequence[str] = (),
        authentication: tuple[str, str] | None = None,
        tls: tuple[Path, Path] | None = None,
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.endpoint = ""
        self.namesrv = ""
        self.broker_address = ""
        self._port = port
        self._namesrv_port = namesrv_port
        self._data = data
        self._cache = cache
        self._broker_options = dict(broker_options or {})
        self._proxy_options = dict(proxy_options or {})
        self._java_options = tuple(java_options)
        self._authentication = authentication
        self._tls = tls
        self._on_progress = on_progress
        self._resources: ExitStack | None = None
        self._processes: dict[str, Process] = {}

    def start(self) -> None:
        """Start all three and wait until a LiteTopic really answers.

        Raises:
            ConfigurationError: Java or Maven is missing, the port or the data folder is in use, …
            BrokerUnreachable: It did not come up in time, or ended early; the message quotes its output.
            ClosedError: It runs already.
        """
        if self._resources is not None:
            raise ClosedError("This RocketMQ runs already: stop it before it is started again.")
        java = _find_java()
        jars = rocketmq_jars(self._cache, self._on_progress)
        self._resources = ExitStack()
        try:
            self._prepare(java, jars, self._resources)
            deadline = time.monotonic() + START_TIMEOUT
            self._on_progress("Starting Apache RocketMQ …")
            self._processes["nameserver"].start()
            self._processes["broker"].start()
            self._await_broker(deadline)
            self._await_proxy(deadline)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop all three and wait until they are gone. A durable store is flushed first. Repeated calls are safe."""
        resources, self._resources = self._resources, None
        if resources is None:
            return
        with resources:
            # A temporary store is thrown away, so nothing is lost with a kill. Proxy and name server keep nothing.
            processes, self._processes = self._processes, {}
            for name in reversed(processes):
                if name == "broker" and self._data is not None:
                    self._on_progress("Waiting for the broker to flush what it holds, some 15 s …")
                    processes[name].stop(timeout=STOP_TIMEOUT)
                processes[name].kill()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start_proxy(self) -> None:
        """Start the proxy again, on the same port, and wait until a LiteTopic answers (errors as `start`)."""
        self._process("proxy")
        self._await_proxy(time.monotonic() + START_TIMEOUT)

    def stop_proxy(self) -> None:
        """Stop the proxy in an orderly way, which takes some seconds."""
        self._process("proxy").stop(timeout=STOP_TIMEOUT)

    def kill_proxy(self) -> None:
        """End the proxy at once, as `kill -9` does."""
        self._process("proxy").kill()

    def pause_proxy(self) -> None:
        """Freeze the proxy: connections stay open, nobody answers."""
        self._process("proxy").pause()

    def resume_proxy(self) -> None:
        """Let a frozen proxy go on."""
        self._process("proxy").resume()

    def start_broker(self) -> None:
        """Start the broker again, same ports and store, and wait until it answers (errors as `start`).

        Where the proxy runs, that is until a LiteTopic answers through it.
        """
        deadline = time.monotonic() + START_TIMEOUT
        self._process("broker").start()
        self._await_broker(deadline)
        if self._process("proxy").running:
            self._await_proxy(deadline)

    def stop_broker(self) -> None:
        """Stop the broker in an orderly way, its store flushed, which takes some 12 seconds."""
        self._process("broker").stop(timeout=STOP_TIMEOUT)

    def kill_broker(self) -> None:
        """End the broker at once, as `kill -9` does."""
        self._process("broker").kill()

    def pause_broker(self) -> None:
        """Freeze the broker: connections stay open, nobody answers."""
        self._process("broker").pause()

    def resume_broker(self) -> None:
        """Let a frozen broker go on."""
        self._process("broker").resume()

    def check(self) -> None:
        """See whether all three run.

        Raises:
            BrokerUnreachable: One has ended; the message quotes its output.
        """
        self._check_running(set(_MAIN_CLASS))

    @property
    def pids(self) -> dict[str, int]:
        """The process ids of `nameserver`, `broker` and `proxy`, as far as they run."""
        return {name: process.pid for name, process in self._processes.items() if process.pid is not None}

    @property
    def _config(self) -> RocketMQConfig:
        access_key, secret_key = self._authentication or (None, None)
        return RocketMQConfig(
            endpoint=self.endpoint, namesrv=self.namesrv, access_key=access_key, secret_key=secret_key
        )

    def _process(self, name: str) -> Process:
        if name not in self._processes:
            raise ClosedError("This RocketMQ is not running.")
        return self._processes[name]

    def _await_broker(self, deadline: float) -> None:
        self._wait(lambda: broker_answers(self._config, self.broker_address), deadline)

    def _await_proxy(self, deadline: float) -> None:
        proxy = self._processes["proxy"]
        for starts_left in reversed(range(PROXY_STARTS)):
            proxy.start()
            try:
                self._wait(lambda: lite_topic_answers(self._config), deadline)
            except BrokerUnreachable:
                # It ends when the broker takes long over its very first calls, as on a busy machine.
                if proxy.running or starts_left == 0:
                    raise
            else:
                return

    def _wait(self, attempt: Callable[[], None], deadline: float) -> None:
        started = {name for name, process in self._processes.items() if process.running}
        try:
            wait_until(attempt, deadline=deadline, still_possible=lambda: self._check_running(started))
        except BrokerError as error:
            self._check_running(started)
            raise BrokerUnreachable(f"Apache RocketMQ does not answer: {error}\n{self._tails()}") from error

    def _check_running(self, names: set[str]) -> None:
        ended = [name for name in sorted(names) if not self._process(name).running]
        if ended:
            raise BrokerUnreachable(f"Apache RocketMQ's {' and '.join(ended)} ended.\n{self._tails()}")

    def _tails(self) -> str:
        return "\n".join(
            f"--- {name} ({process.folder})\n{process.output_tail()}" for name, process in self._processes.items()
        )

    def _prepare(self, java: str, jars: Path, resources: ExitStack) -> None:
        if self._data is None:
            folder = resources.enter_context(temporary_folder("rocketmq-"))
        else:
            folder = self._data.absolute()
            folder.mkdir(parents=True, exist_ok=True)
            resources.enter_context(file_lock(folder / ".lock", timeout=0))
        ports = Ports()
        resources.callback(ports.close)
        proxy_port = ports.take(self._port) if self._port else ports.choose()
        broker_port = ports.choose(also_below=_FAST_PORT_BELOW)
        namesrv_port = ports.take(self._namesrv_port) if self._namesrv_port else ports.choose()
        self.endpoint = f"{_LOCALHOST}:{proxy_port}"
        self.namesrv = f"{_LOCALHOST}:{namesrv_port}"
        self.broker_address = f"{_LOCALHOST}:{broker_port}"

        settings = folder / "conf"
        settings.mkdir(exist_ok=True)
        (settings / "namesrv.conf").write_text(
            _properties({"listenPort": str(namesrv_port), "bindAddress": _LOCALHOST}), encoding="utf-8"
        )
        (settings / "broker.conf").write_text(
            _properties(self._broker_settings(folder, broker_port, ports.choose())), encoding="utf-8"
        )
        (settings / "rmq-proxy.json").write_text(
            json.dumps(self._proxy_settings(proxy_port, ports.choose()), indent=2), encoding="utf-8"
        )
        for path in ("broker.conf", "rmq-proxy.json"):
            # They may hold the super user's keys.
            (settings / path).chmod(0o600)

        starter = Starter()
        resources.callback(starter.close)
        arguments = {
            "nameserver": ("-c", str(settings / "namesrv.conf")),
            "broker": ("-c", str(settings / "broker.conf")),
            "proxy": ("-n", self.namesrv, "-pm", "cluster", "-pc", str(settings / "rmq-proxy.json")),
        }
        java_options = {
            "nameserver": _PLAINTEXT,
            "broker": (*_PLAINTEXT, *_BROKER_JAVA_OPTIONS),
            "proxy": _PLAINTEXT_OR_TLS,
        }
        for name, main_class in _MAIN_CLASS.items():
            command = (
                java,
                f"-Xmx{_HEAP[name]}",
                *_JAVA_OPTIONS,
                *java_options[name],
                *self._java_options,
                f"-Drocketmq.home.dir={folder}",
                # RocketMQ logs below the home directory, and knows no other way to say where.
                f"-Duser.home={folder / name}",
                "-cp",
                f"{jars}/*",
                main_class,
                *arguments[name],
            )
            self._processes[name] = Process(name, command, folder=folder / name, starter=starter)

    def _broker_settings(self, folder: Path, port: int, ha_port: int) -> dict[str, str]:
        store = folder / "store"
        settings = _BROKER_OPTIONS | {
            "namesrvAddr": self.namesrv,
            "listenPort": str(port),
            "haListenPort": str(ha_port),
            "storePathRootDir": str(store),
            "storePathCommitLog": str(store / "commitlog"),
        }
        if self._authentication is not None:
            settings |= _authentication_settings(self._authentication) | {
                "authenticationMetadataProvider": (
                    "org.apache.rocketmq.auth.authentication.provider.LocalAuthenticationMetadataProvider"
                ),
            }
        return settings | self._broker_options

    def _proxy_settings(self, port: int, remoting_port: int) -> dict[str, object]:
        settings = {
            **_PROXY_OPTIONS,
            "namesrvAddr": self.namesrv,
            "grpcServerPort": port,
            "remotingListenPort": remoting_port,
        }
        if self._authentication is not None:
            settings |= _authentication_settings(self._authentication) | {
                "authenticationEnabled": True,
                # The proxy's own calls to the broker must be signed as well.
                "enableAclRpcHookForClusterMode": True,
                "authenticationMetadataProvider": (
                    "org.apache.rocketmq.proxy.auth.ProxyAuthenticationMetadataProvider"
                ),
            }
        if self._tls is not None:
            certificate, key = self._tls
            settings |= {
                "tlsTestModeEnable": False,
                "tlsCertPath": str(certificate.absolute()),
                "tlsKeyPath": str(key.absolute()),
            }
        return settings | self._proxy_options


def _authentication_settings(authentication: tuple[str, str]) -> dict[str, str]:
    access_key, secret_key = authentication
    return {
        "authenticationEnabled": "true",
        "authenticationProvider": ("org.apache.rocketmq.auth.authentication.provider.DefaultAuthenticationProvider"),
        "initAuthenticationUser": json.dumps({"username": access_key, "password": secret_key}),
        "innerClientAuthenticationCredentials": json.dumps({"accessKey": access_key, "secretKey": secret_key}),
    }


def _properties(values: Mapping[str, str]) -> str:
    # The format of java.util.Properties, where a backslash escapes.
    return "".join(f"{key}={value.replace(chr(92), chr(92) * 2)}\n" for key, value in values.items())


def _find_java() -> str:
    home = os.environ.get("JAVA_HOME", "")
    java = shutil.which("java", path=str(Path(home) / "bin")) if home else None
    java = java or shutil.which("java")
    if java is None:
        raise ConfigurationError(
            "Apache RocketMQ needs Java, and there is no `java` in JAVA_HOME or on the PATH: install a Java runtime, "
            "17 recommended (Debian: apt install openjdk-17-jre-headless; macOS: brew install openjdk@17)."
        )
    return java
