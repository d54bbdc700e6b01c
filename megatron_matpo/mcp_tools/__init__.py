"""Tools over the Model Context Protocol: the client pool, and the bundled document server.

Nothing is imported here: the server starts in a tenth of a second because it never loads the SDK.
"""
