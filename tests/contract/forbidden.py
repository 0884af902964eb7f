"""What the home profile takes away: words, paths and fields, each to be tried for real."""

from __future__ import annotations

import re

WORDS = re.compile(
    r"policy[ _-]?label|correlation|request[ _-]?id|trace[ _-]?(id|parent)|tenan|rbac|quota|fairness|"
    r"\brole[ _-]?based|\bwfq\b|\bedf\b|deadline|preempt|resum(able|ptions?)|canary|\bdraft|deprecated|rollout|"
    r"\bdrain(s|ed|ing)?\b|\bp9[59]\b|percentile|artifact|sbom|signature|\bcdc\b|numa\b|pcie|topolog|"
    r"tensor[ _-]?split|admission[ _-]?share",
    re.IGNORECASE,
)
"""What may occur in no answer, document or setting."""

_URL = re.compile(r"https?://\S+")


def words_in(text: str) -> set[str]:
    """The forbidden words of a text; addresses are no words."""
    return {match[0] for match in WORDS.finditer(_URL.sub("", text))}


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

TENANTS = ("/v1/tenants", "/v1/tenants/x", "/v1/roles", "/v1/policies", "/v1/quotas", "/v1/users", "/v1/tokens")
RESUMABLE = ("/v1/tasks/x/resume", "/v1/tasks/x/preempt", "/v1/tasks/x/pause", "/v1/jobs", "/v1/sessions")
DRAINS = (
    "/v1/pools/default/drain",
    "/v1/pools/default/undrain",
    "/v1/replicasets",
    "/v1/replicasets/x/drain",
    "/v1/replicas/0/drain",
    "/v1/drain",
    "/drain",
)
CANARIES = (
    "/v1/pools/default/canary",
    "/v1/pools/default/rollout",
    "/v1/pools/default/promote",
    "/v1/canaries",
    "/v1/models/x/state",
    "/v1/models/x/deprecate",
)
ARTIFACTS = ("/v1/artifacts", "/v1/artifacts/x", "/v1/artifacts/sha256:0", "/v1/catalog/models", "/v1/registry", "/v2/")
CDC = ("/v1/cdc", "/cdc", "/v1/contracts", "/_pact/provider-states", "/_pact/provider_states", "/provider-states")

REQUEST_FIELDS = {
    "tenant": "acme",
    "tenant_id": "acme",
    "user": "me",
    "role": "admin",
    "org": "acme",
    "quota": 5,
    "weight": 3,
    "share": 0.5,
    "deadline_ms": 1000,
    "deadline": "2030-01-01T00:00:00Z",
    "timeout_ms": 1000,
    "preemptible": True,
    "resumable": True,
    "resume_token": "x",
    "session_id": "x",
    "correlation_id": "x",
    "policy_label": "x",
    "numa_node": 0,
    "gpu": 0,
    "tensor_split": [0.5, 0.5],
}
"""Fields of the full profile's requests, with a value that would be right there."""

CONFIG_KEYS = (
    "[tenants]",
    "[rbac]",
    "[quotas]",
    "[fairness]",
    "[preemption]",
    "[deadlines]",
    "[canary]",
    "[trust]",
    "[server]\ntokens = []",
    "[server]\nadmin_token = 'x'",
    "[server]\ntenant = 'x'",
    "[server]\ncorrelation_id_header = 'x'",
    "[queue]\nquota = 1",
    "[queue]\nweights = [1, 2]",
    "[queue]\nfair = true",
    "[queue]\npriorities = ['a', 'b', 'c']",
    "[queue]\ndeadline_ms = 1",
    "[queue]\npreempt = true",
    "[queue]\npolicy = 'drop-lru'",
    "[tasks]\ndeadline_s = 1",
    "[tasks]\nresumable = true",
    "[models]\nrequire_signatures = true",
    "[models]\nsbom = 'x'",
    "[models]\nregistry = 'x'",
    "[[pools]]\nmodel = 'x'\nnuma = 0",
    "[[pools]]\nmodel = 'x'\npcie = 'x'",
    "[[pools]]\nmodel = 'x'\ntensor_split = [0.5, 0.5]",
    "[[pools]]\nmodel = 'x'\nsplit_mode = 'layer'",
    "[[pools]]\nmodel = 'x'\nmain_gpu = 0",
    "[[pools]]\nmodel = 'x'\ncanary_percent = 5",
    "[[pools]]\nmodel = 'x'\nstate = 'Draft'",
    "[[pools]]\nmodel = 'x'\nquota = 5",
)
"""Settings of the full profile."""

METRICS = (
    "admission_share",
    "deadlines_met_ratio",
    "preemptions_total",
    "resumptions_total",
    "tenant_queue_depth",
    "fairness_ratio",
    "latency_first_token_ms",
    "latency_decode_ms",
    "latency_ms_bucket",
    "latency_ms_sum",
    "task_duration_seconds_bucket",
    "latency_p95",
    "latency_p99",
)
"""Series of the full profile."""
