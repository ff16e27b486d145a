"""`pmclip-deploy serve`: questions and pictures over HTTP, and a page for a workstation. Needs the extra `ward`.

    request -> guard (host, token, limits, places) -> app (routes) -> service -> readers (decode, in processes) -> model (queue) -> reply

Nothing of a request is written to disk. Logs, metrics and errors hold no name, path, question, answer or picture.
"""
