"""A travel assistant of three agents in three processes, which talk A2A over RocketMQ.

Start with the processes: `weather_agent` and `travel_agent` are services, `supervisor` is the terminal; `__main__` starts
all of them and a broker. `agents` makes the three AgentScope agents, `models` chooses their chat model.

The offline model: `offline_model` is the AgentScope model, `policies` its rules in each role, `understanding` what it makes
of a question (with `dates` and `places`), `trip` the request to the travel agent, `plan` the plan it writes.

Data: `weather` (Open-Meteo or `data/cities.json`), `guide` (`data/guide.json`).
"""
