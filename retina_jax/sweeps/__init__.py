"""Many runs of one kind: named points over a base config, each trained once, wherever and however often it is asked for."""
