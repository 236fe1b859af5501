"""The scripts of this folder import systems that the test environment lacks, so pytest collects none of them."""

collect_ignore_glob = ["*.py"]
