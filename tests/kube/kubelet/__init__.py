"""A kubelet, a scheduler and a service proxy for tests: pods are bound to nodes, and their commands really run here.

**Honoured.** Commands with $(NAME), environment of every kind (also Services' variables), working folders, volumes
(`volumes.py`), a read-only root; a network namespace and a new address for every pod, hostNetwork (a namespace per
node), hostname and subdomain, hostAliases, /dev/shm of 64 MiB; process, mount, IPC and host-name namespaces; init
containers; startup, readiness and liveness probes; restart policies with back-off (the first restart at once, then 1 s,
2 s, …: a tenth of the real one); preStop, SIGTERM, grace, SIGKILL; readiness gates; images that cannot be pulled
(`Kubelet.missing_images`) and images that set an environment (`Kubelet.images`); placement (`placement.py`), gangs
among it; names (`names.py`); ClusterIPs (`proxy.py`); claims (`claims.py`); nodes that are lost and come back; Events.

**Not honoured.** Images: every container sees this machine's own programs, with empty /tmp, /var/tmp and /run, on a
root of its own that ends with it. Users: every process is root (the log says so). Limits of cpu and memory,
capabilities, seccomp, network policies. postStart hooks, termination messages, ephemeral containers, static pods,
changes of a pod in place, activeDeadlineSeconds of a pod, refreshed tokens and ConfigMaps. `kubectl logs`,
`exec` and `port-forward`: use `Kubelet.logs`. A process that is the first of its container, and has no handler for
SIGTERM, runs until its grace is over, as everywhere.
"""

from kube.kubelet.host import Image
from kube.kubelet.kubelet import Kubelet, remove_leftovers

__all__ = ["Image", "Kubelet", "remove_leftovers"]
