"""When and how the replicas of a model are made equal: one file a strategy."""
