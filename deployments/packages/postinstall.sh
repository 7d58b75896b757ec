#!/bin/sh
# After an installation or an upgrade: Debian gives "configure" and the version before, Red Hat the number of versions.
set -e
[ -d /run/systemd/system ] || exit 0
systemctl daemon-reload || true
case "$1:$2" in
configure:?* | 2:*) ;;
*) # nothing ran before; which daemon this machine needs is the operator's to say
	echo 'kedge: nothing runs yet. What to do next: kedge help install'
	exit 0
	;;
esac
if grep -qs /kedge-agent.service /proc/self/cgroup; then
	# The upgrade is a release's command. The agent's end would cut it off, so it restarts when the release is done.
	# Nothing waits for it there: a stop that cancels the restart would leave a failed unit of that timer behind.
	systemd-run --quiet --on-active=5 systemctl --no-block try-restart \
		kedge-agent.service kedge-mirror.service kedge-web.service
else
	# An agent that is stopped in mid-deployment ends its commands in order, and the next goes on by the journal.
	systemctl try-restart --no-block kedge-agent.service kedge-mirror.service kedge-web.service || true
fi
