"""How long what decode says is kept back while prefill's word on it is missing, or says otherwise. In seconds."""

CONFIRM_KV_S = 1.0
"""Decode's first tokens in a stream, until prefill says that the KV is good; unless somebody says otherwise, in the
product and in its simulation alike."""
DOUBT_S = 1.0
"""So long may decode's word that it gave up itself be behind that of prefill."""
