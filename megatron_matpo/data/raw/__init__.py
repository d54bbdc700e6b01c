"""The configs of MATPO-data, built from the public raw files of their sources."""
