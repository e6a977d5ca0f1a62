"""An OpenAI-compatible server over HTTP on exported programs.

In: artifacts' programs with their runners, and requests. Out: answers, whole or streamed. One file for each subject,
from the runner to the socket:

``prefixes`` snapshots of prompts that were seen; ``prefilling`` a prompt on its way into a runner; ``generating`` one
answer; ``rows`` requests that are decoded together, or one alone; ``job`` a request on its way; ``batching`` those
that are under way; ``engine`` the queue and the thread of a program; ``fields``, ``sampling_request``,
``chat_request`` and ``completion_request`` what a body asks for; ``chat_answer`` and ``completion_answer`` what goes
back, ``logprobs`` within it; ``embeddings`` of encoders; ``errors``; ``metrics``; ``access`` who may ask;
``answering`` whole and streamed, until a client goes away; ``chat_page`` and the folder ``page`` what a browser is
shown; ``app`` the paths; ``listening`` socket and signals.

Only ``access``, ``answering``, ``chat_page``, ``app`` and ``listening`` know the web framework (the extra ``serve``).
"""
