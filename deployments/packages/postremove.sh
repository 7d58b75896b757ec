#!/bin/sh
# After a removal. A purge takes the agent's state along, and never a release: those lie where manifests say.
set -e
[ ! -d /run/systemd/system ] || systemctl daemon-reload || true
[ "$1" != purge ] || rm -rf /var/lib/kedge /var/cache/private/kedge-mirror /var/cache/kedge-mirror
