package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/coreos/go-systemd/v22/journal"

	"kedge/policy"
	"kedge/sync/agent"
)

// reportToSystemd notifies systemd about an agent. It sends READY once, when node is idle (see
// Agent.Idle) or timeout has passed. Before READY it asks for a longer start timeout; afterwards it
// sends keep-alives if systemd has a watchdog. It sends both, and a line for systemctl status, only
// while the agent's loop runs. When ctx ends it sends STOPPING and returns. It returns at once if
// systemd expects no notifications.
func reportToSystemd(ctx context.Context, node *agent.Agent, timeout time.Duration, log *slog.Logger) {
	if os.Getenv("NOTIFY_SOCKET") == "" {
		return
	}
	watchdog, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		log.Warn("could not read systemd's watchdog settings (WATCHDOG_USEC, WATCHDOG_PID): no keep-alives are sent, "+
			"so that systemd may restart the agent: see WatchdogSec in the service",
			"error", err)
	}
	const often = 10 * time.Second
	interval := min(cmp.Or(watchdog/3, often), often)
	tick := time.NewTicker(interval)
	defer tick.Stop()
	idle, late := node.Idle(), time.After(timeout)
	starting := true
	for {
		// A stuck loop sends nothing, so that systemd restarts the agent.
		if node.Alive() {
			lines := []string{"STATUS=" + statusLine(node.Status())}
			if starting {
				lines = append(lines, fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", (4*often).Microseconds()))
			} else if watchdog > 0 {
				lines = append(lines, daemon.SdNotifyWatchdog)
			}
			notifySystemd(log, lines...)
		}
		select {
		case <-ctx.Done():
			notifySystemd(log, daemon.SdNotifyStopping, "STATUS=stopping: an unfinished deployment goes on at the next start")
			return
		case <-tick.C:
			continue
		case <-idle:
		case <-late:
			log.Warn("not converged in time: reporting ready to systemd anyway", "after", timeout)
		}
		idle, late, starting = nil, nil, false
		notifySystemd(log, daemon.SdNotifyReady)
	}
}

func notifySystemd(log *slog.Logger, lines ...string) {
	if _, err := daemon.SdNotify(false, strings.Join(lines, "\n")); err != nil {
		log.Warn("could not send the agent's status to systemd, which goes by the last one", "error", err)
	}
}

// statusLine returns a line that says whether a node is ready, with the version and the state of each unit.
func statusLine(s policy.NodeStatus) string {
	var units []string
	for _, role := range slices.Sorted(maps.Keys(s.Roles)) {
		for _, name := range slices.Sorted(maps.Keys(s.Roles[role].Units)) {
			u := s.Roles[role].Units[name]
			units = append(units, strings.Join(strings.Fields(fmt.Sprintf("%s/%s %s %s", role, name, u.Version, u.State)), " "))
		}
	}
	line := "ready"
	if !s.Ready {
		line = "not ready"
	}
	if len(units) > 0 {
		line += ": " + strings.Join(units, ", ")
	}
	return line
}

// journalWriter writes log lines for systemd's journal, each prefixed with its priority
// (sd-daemon(3)), so that journalctl --priority=warning works. Lines begin with their level, as the
// journal adds the time.
type journalWriter struct{ w io.Writer }

func (j journalWriter) Write(line []byte) (int, error) {
	prefix := "<6>"
	for _, p := range []struct{ level, prefix string }{{"DEBUG", "<7>"}, {"WARN", "<4>"}, {"ERROR", "<3>"}} {
		if bytes.HasPrefix(line, []byte("level="+p.level)) || bytes.HasPrefix(line, []byte(`{"level":"`+p.level)) {
			prefix = p.prefix
		}
	}
	if _, err := j.w.Write(append([]byte(prefix), line...)); err != nil {
		return 0, err
	}
	return len(line), nil
}

// forJournal returns the writer for a log to stderr. If stderr is connected to systemd's journal,
// it returns a journalWriter, and sets opt to leave out the time; otherwise it returns stderr.
func forJournal(stderr io.Writer, opt *slog.HandlerOptions) io.Writer {
	if there, err := journal.StderrIsJournalStream(); err != nil || !there || stderr != os.Stderr {
		return stderr
	}
	opt.ReplaceAttr = withoutTime
	return journalWriter{stderr}
}

func withoutTime(groups []string, a slog.Attr) slog.Attr {
	if len(groups) == 0 && a.Key == slog.TimeKey {
		return slog.Attr{}
	}
	return a
}
