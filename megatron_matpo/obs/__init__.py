"""What a run leaves behind: metrics, status and failure files, recorded rollouts, the report.

Torch-free, so that the supervisor, the manager and the report can import it in milliseconds. Every
file is written atomically: a reader sees the old or the new content, whatever was killed when.
"""
