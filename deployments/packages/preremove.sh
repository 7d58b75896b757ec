#!/bin/sh
# Before a removal, not an upgrade: the daemons end, what they deployed stays and goes on.
set -e
case "$1" in
remove | 0) ;;
*) exit 0 ;;
esac
[ -d /run/systemd/system ] || exit 0
systemctl --quiet disable --now kedge-agent.service kedge-mirror.service kedge-web.service || true
