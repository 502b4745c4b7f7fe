"""The server as many copies, on Ray Serve: on one machine or on a cluster.

- a replica is the app of `heronry serve` in a process of its own; every model has replicas of its own, and its adapters
  and tuned states are in each of them, since they share its weights
- what is kept is in a store that all replicas share, so that it does not matter which of them answers, or dies
- a front passes requests on: in the process of `heronry serve --replicas`, or in one of Ray's for `serve deploy`
"""
