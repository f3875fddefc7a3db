"""Adapters of several runs over one backbone, behind an HTTP server that speaks OpenAI's protocol.

run.py          a process that serves until a signal: address, uvicorn, end
app.py          the HTTP surface
fields.py       the fields of a request's body; what is not supported is refused by name
batching.py     which requests share a call of generate, in one thread
generation.py   such a call: one adapter per row, each row's text as it comes
text.py         tokens to text, piece by piece, up to a stop string
models.py       runs onto one backbone
"""
