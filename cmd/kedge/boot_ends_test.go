package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kedge/deployments"
)

// testBootEnds deploys releases whose commands end the agent or the machine, and one whose service systemd refuses to
// start again: each is tried a few times and no more, and the machine goes back to what it ran.
func testBootEnds(t *testing.T, m *machine) {
	one := m.publish("1")
	m.release(one)
	m.boot()
	m.dropIn("kedge-agent", "[Service]\nRestartSec=100ms\n")
	m.runs("1")

	goesBack := func(version string, bad ...change) {
		t.Helper()
		p := m.publish(version, bad...)
		m.release(p)
		m.report("the failure of "+version, func(u deployments.UnitReport) bool {
			return u.Want == p && u.State == deployments.StateQuarantined && u.Version == "1" &&
				strings.Contains(u.Error, "stopped 3 times")
		})
		m.answers("1")
		if n := m.do("sh", "-c", "wc -l <"+tries(version)); n != "3" {
			t.Errorf("%s was tried %s times, want 3", version, n)
		}
		m.do("/usr/bin/kedge", "wait", "--ready", m.agent, "--timeout", "30s")
	}
	try := func(version, then string) change { return post("echo x >>" + tries(version) + "; " + then) }

	goesBack("2", try("2", "kill -9 $PPID; sleep 60"))
	goesBack("3", try("3", "systemctl restart kedge-agent; sleep 60"))
	if n := m.number("kedge-agent", "NRestarts"); n > 10 {
		t.Errorf("systemd has started the agent %d times", n)
	}

	// A command that ends the machine, told to run once, and not.
	m.release(m.publish("4", func(_ string, manifest *deployments.Manifest) {
		reboot := deployments.Command{Run: "echo x >>" + tries("4") + "; sync; systemctl reboot; sleep 60", Once: true}
		manifest.Commands.Post = append([]deployments.Command{reboot}, manifest.Commands.Post...)
	}))
	m.reboots()
	m.report("4", func(u deployments.UnitReport) bool { return u.State == deployments.StateConverged && u.Version == "4" })
	m.answers("4")
	m.release(one)
	m.answers("1")
	if n := m.do("sh", "-c", "wc -l <"+tries("4")); n != "1" {
		t.Errorf("a command that is to run once ran %s times", n)
	}
	m.report("1", func(u deployments.UnitReport) bool { return u.State == deployments.StateConverged && u.Version == "1" })
	reboots := m.publish("5", try("5", "sync; systemctl reboot; sleep 60"))
	m.release(reboots)
	for range 3 {
		m.reboots()
	}
	m.report("the failure of 5", func(u deployments.UnitReport) bool {
		return u.Want == reboots && u.State == deployments.StateQuarantined && u.Version == "1" &&
			strings.Contains(u.Error, "stopped 3 times")
	})
	m.answers("1")

	// The way back is refused until systemd's limit of starts is over: it is tried until then.
	m.dropIn("app", "[Unit]\nStartLimitIntervalSec=6\nStartLimitBurst=2\n[Service]\nRestart=on-failure\nRestartSec=10ms\n")
	dead := m.publish("6", func(tree string, manifest *deployments.Manifest) {
		if err := os.WriteFile(filepath.Join(tree, "bin/start"), []byte("#!/bin/sh\nexit 1\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		manifest.Health.Timeout = time.Second
	})
	m.release(dead)
	m.report("that the way back doesn't hold yet", func(u deployments.UnitReport) bool {
		return u.Want == dead && u.State == deployments.StateUnhealthy
	})
	await(t, "/ready", func() error {
		if out, err := m.try("/usr/bin/kedge", "wait", "--ready", m.agent, "--timeout", "100ms"); err == nil {
			return fmt.Errorf("it is 200 while the service is down: %s", out)
		}
		return nil
	})
	m.report("the way back", func(u deployments.UnitReport) bool {
		return u.Want == dead && u.State == deployments.StateQuarantined && u.Version == "1"
	})
	m.answers("1")
	m.is("app", "active")
	m.do("/usr/bin/kedge", "wait", "--ready", m.agent, "--timeout", "30s")
}

// tries is a file with a line for each time that a version's command was run.
func tries(version string) string { return "/var/log/tries-" + version }

// reboots waits until the machine has asked to be booted anew, and does so: the container leaves that to who keeps it.
func (m *machine) reboots() {
	m.t.Helper()
	select {
	case <-m.done:
	case <-time.After(60 * time.Second):
		m.t.Fatalf("%s doesn't reboot: %s", m.name, m.console())
	}
	m.cut()
	m.boot()
}

// dropIn adds settings to a unit of systemd.
func (m *machine) dropIn(unit, text string) {
	m.t.Helper()
	m.do("sh", "-c", `mkdir -p "$1" && printf %s "$2" >"$1/test.conf" && systemctl daemon-reload`, "sh",
		"/etc/systemd/system/"+unit+".service.d", text)
}
