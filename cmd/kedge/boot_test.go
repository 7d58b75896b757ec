package main

import (
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/deployments/tooltest"
	"kedge/kv"
)

// TestBoot boots machines by systemd, as a fleet's nodes are: the units as they are shipped, a Consul agent each
// with the least token, S3, and a mirror.
func TestBoot(t *testing.T) {
	t.Parallel()
	tooltest.NeedRoot(t)
	machines := map[string]func(*testing.T, *machine){
		"boot-day":    testBootDay,
		"boot-ends":   testBootEnds,
		"boot-cut":    testBootCut,
		"boot-outage": testBootOutage,
	}
	w := newWorld(t, slices.Sorted(maps.Keys(machines))...)
	w.startMirror("mirror-1")
	kedge := releasedProgram(t)
	for name, test := range machines {
		t.Run(strings.TrimPrefix(name, "boot-"), func(t *testing.T) {
			t.Parallel()
			test(t, newMachine(t, w, kedge, name, "ready_timeout: 40s", "max_bandwidth: 4MB/s"))
		})
	}
}

type change = func(tree string, m *deployments.Manifest)

func pre(run string) change {
	return func(_ string, m *deployments.Manifest) {
		m.Commands.Pre = append(m.Commands.Pre, deployments.Command{Run: run})
	}
}

// post runs before the application is restarted.
func post(run string) change {
	return func(_ string, m *deployments.Manifest) {
		m.Commands.Post = append([]deployments.Command{{Run: run}}, m.Commands.Post...)
	}
}

// appears waits until a file is there on the machine.
func (m *machine) appears(path string) {
	m.t.Helper()
	await(m.t, path, func() error { _, err := m.try("test", "-e", path); return err })
}

// report waits until what the machine says of the application, in Consul, is as ok says.
func (m *machine) report(what string, ok func(deployments.UnitReport) bool) {
	m.t.Helper()
	await(m.t, what+" is reported", func() error {
		entry, err := m.w.store.Get(m.t.Context(), kv.StatusKey("prod", m.name, m.name))
		if err != nil {
			return err
		}
		report, err := deployments.ParseReport(entry.Value)
		if err != nil {
			return err
		}
		if u := report.Units["app"]; !ok(u) {
			return fmt.Errorf("the report is %+v", u)
		}
		return nil
	})
}

// runs waits until version is converged, serves, and nothing half made lies around.
func (m *machine) runs(version string) {
	m.t.Helper()
	m.report(version, func(u deployments.UnitReport) bool {
		other := func(d deployments.Digest) bool { return d != m.bad.Digest }
		return u.State == deployments.StateConverged && u.Version == version && u.Error == "" &&
			!slices.ContainsFunc(u.Quarantined, other)
	})
	m.answers(version)
	if out := m.do("/usr/bin/kedge", "wait", "--ready", m.agent, "--timeout", "30s"); out != "" {
		m.t.Errorf("kedge wait --ready printed %q", out)
	}
	if left := m.do("find", "/srv/app.releases", "/var/lib/kedge", "-name", "staging-*", "-o", "-name", ".*.json?*"); left != "" {
		m.t.Errorf("left behind: %s", left)
	}
	if failed := m.do("systemctl", "--failed", "--no-legend", "--plain"); failed != "" {
		m.t.Errorf("units that failed: %s", failed)
	}
}

// bootedInOrder checks that what needs the release in place started after the agent said that it is.
func (m *machine) bootedInOrder() {
	m.t.Helper()
	if state := m.do("systemctl", "is-system-running", "--wait"); state != "running" {
		m.t.Errorf("the system is %s", state)
	}
	began, ready := m.number("kedge-agent", "ExecMainStartTimestampMonotonic"), m.number("kedge-agent", "ActiveEnterTimestampMonotonic")
	app, consumer := m.number("app", "ExecMainStartTimestampMonotonic"), m.number("consumer", "ExecMainStartTimestampMonotonic")
	users := m.number("multi-user.target", "ActiveEnterTimestampMonotonic")
	if !(began < ready && ready <= consumer && consumer <= users) {
		m.t.Errorf("agent started at %d µs and was ready at %d, what needs it started at %d, multi-user.target at %d", began, ready, consumer, users)
	}
	m.t.Logf("since the agent's start: ready %s, application %s, what needs it %s, multi-user.target %s", us(ready-began), us(app-began), us(consumer-began), us(users-began))
}

func us(n int64) time.Duration { return time.Duration(n) * time.Microsecond }

// testBootDay is a machine's day: its first boot, a release, a bad one, restarts and an upgrade of the agent, a
// hang, a reboot.
func testBootDay(t *testing.T, m *machine) {
	m.release(m.publish("1", pre("touch /run/pre; while [ ! -e /run/go ]; do sleep 0.05; done")))
	// A role that the mirror has yet to see has no folder keys, of which an agent would warn rightly.
	await(t, "the record", func() error { _, err := m.w.store.Get(t.Context(), kv.DesiredKey(m.id())); return err })
	m.boot()
	m.appears("/run/pre")
	if state := m.show("kedge-agent", "ActiveState"); state != "activating" {
		t.Errorf("before the first convergence the agent is %s", state)
	}
	for _, unit := range []string{"app", "consumer", "kedge-converged.target", "kedge-apps.target", "multi-user.target"} {
		if state := m.show(unit, "ActiveState"); state != "inactive" {
			t.Errorf("before the first convergence %s is %s", unit, state)
		}
	}
	if state, _ := m.try("systemctl", "is-system-running"); state != "starting" {
		t.Errorf("before the first convergence the system is %s", state)
	}
	m.do("touch", "/run/go")
	m.runs("1")
	m.bootedInOrder()
	if status := m.show("kedge-agent", "StatusText"); !strings.Contains(status, "app 1 converged") {
		t.Errorf("systemctl status says %q", status)
	}
	if log := m.do("journalctl", "--no-pager", "--priority=warning", "-u", "kedge-agent", "--output=cat"); log != "" {
		t.Errorf("the first boot has warnings:\n%s", log)
	}
	m.units()

	t.Run("a release restarts its application, and that alone", func(t *testing.T) {
		agent, app, consumer := m.show("kedge-agent", "InvocationID"), m.show("app", "InvocationID"), m.show("consumer", "InvocationID")
		m.release(m.publish("2"))
		m.runs("2")
		if m.show("app", "InvocationID") == app || m.show("kedge-agent", "InvocationID") != agent || m.show("consumer", "InvocationID") != consumer {
			t.Error("not the application alone was restarted")
		}
	})
	t.Run("commands can do what operators do", func(t *testing.T) {
		m.release(m.publish("3", post(sensible), func(_ string, m *deployments.Manifest) {
			m.Commands.Post = append(m.Commands.Post, deployments.Command{Run: `test "$(id -un)" = deploy && touch ~/was-here`, User: "deploy"})
		}))
		m.runs("3")
	})
	t.Run("a release whose service doesn't start is taken back", func(t *testing.T) {
		bad := m.publish("4", func(tree string, _ *deployments.Manifest) {
			if err := os.WriteFile(filepath.Join(tree, "bin/start"), []byte("#!/bin/sh\nexit 1\n"), 0o755); err != nil {
				t.Fatal(err)
			}
		}, func(_ string, m *deployments.Manifest) { m.Health.Timeout = time.Second })
		m.bad = bad
		m.release(bad)
		m.report("the failure", func(u deployments.UnitReport) bool {
			return u.State == deployments.StateQuarantined && u.Version == "3" && strings.Contains(u.Error, "app.service")
		})
		m.answers("3")
		m.is("app", "active")
		m.do("systemctl", "reload", "kedge-agent")
		await(t, "another try, after a reload", func() error {
			_, err := m.try("sh", "-c", "journalctl --boot --no-pager --unit=kedge-agent | "+
				"grep 'SIGHUP: releases that failed on this node'")
			return err
		})
	})
	t.Run("an agent that is upgraded in the middle of a deployment loses nothing", func(t *testing.T) {
		m.release(m.publish("5", post(`trap "echo ended >>/var/log/hook; exit 1" TERM; touch /run/post; [ -e /run/upgraded ] || { sleep 120 & wait; }`)))
		m.appears("/run/post")
		m.do("sh", "-c", "cp /usr/bin/kedge /usr/bin/.kedge.new && mv /usr/bin/.kedge.new /usr/bin/kedge && touch /run/upgraded")
		m.do("systemctl", "restart", "kedge-agent")
		m.runs("5")
		if log := m.do("cat", "/var/log/hook"); log != "ended" {
			t.Errorf("the command was not ended in order: %q", log)
		}
		if n, err := m.try("pidof", "sleep"); err == nil {
			t.Errorf("left of the command: %s", n)
		}
	})
	t.Run("an agent that hangs is started again", func(t *testing.T) {
		m.do("sh", "-c", "mkdir -p /run/systemd/system/kedge-agent.service.d && printf '[Service]\nWatchdogSec=2\nRestartSec=0\n' >/run/systemd/system/kedge-agent.service.d/test.conf && systemctl daemon-reload && systemctl restart kedge-agent")
		app := m.show("app", "InvocationID")
		m.do("sh", "-c", "kill -STOP "+m.show("kedge-agent", "MainPID"))
		await(t, "a restart by the watchdog", func() error {
			if n := m.number("kedge-agent", "NRestarts"); n != 1 {
				return fmt.Errorf("%d restarts", n)
			}
			return nil
		})
		m.is("kedge-agent", "active")
		if m.show("app", "InvocationID") != app {
			t.Error("the application was restarted as well")
		}
		m.release(m.publish("6"))
		m.runs("6")
	})
	t.Run("a release may bring the agent", func(t *testing.T) {
		agent := m.show("kedge-agent", "InvocationID")
		m.release(m.publish("7", func(_ string, m *deployments.Manifest) {
			m.Commands.Success = []deployments.Command{{Run: "echo success >>/var/log/success; systemd-run --quiet --on-active=0.2 systemctl restart kedge-agent"}}
		}))
		await(t, "a restart of the agent", func() error {
			if m.show("kedge-agent", "InvocationID") == agent || m.show("kedge-agent", "ActiveState") != "active" {
				return fmt.Errorf("it is not restarted yet")
			}
			return nil
		})
		m.runs("7")
		if log := m.do("cat", "/var/log/success"); log != "success" {
			t.Errorf("success commands ran more than once: %q", log)
		}
	})
	t.Run("a shutdown in the middle of a deployment is no fault of the release", func(t *testing.T) {
		// The command fails by itself once systemd stops services, as one that starts a service does.
		m.release(m.publish("8", post(`touch /run/post8; [ -e /var/log/again ] || while systemctl is-system-running | grep -v stopping; do sleep 0.02; done; [ -e /var/log/again ] || { touch /var/log/again; exit 1; }`)))
		m.appears("/run/post8")
		m.powerOff()
		m.boot()
		m.runs("8")
		m.bootedInOrder()
	})
	t.Run("after a reboot the application waits for the agent", func(t *testing.T) {
		m.powerOff()
		m.boot()
		m.runs("8")
		m.bootedInOrder()
		// Not when systemd took note of READY: what the agent then starts is started by its unit, before that counts as
		// active.
		line := m.do("sh", "-c", "journalctl --boot --no-pager --output=short-monotonic --unit=kedge-agent | "+
			"grep 'for the first time since the agent started'")
		var converged float64
		if _, err := fmt.Sscanf(line, "[%f]", &converged); err != nil {
			t.Fatalf("%v: %q", err, line)
		}
		if app := m.number("app", "ExecMainStartTimestampMonotonic"); app < int64(converged*1e6) {
			t.Errorf("the application started %s before the agent had converged", us(int64(converged*1e6)-app))
		}
	})
}

// sensible is what a post command of a package's kind does.
const sensible = `set -e
[ "$(cat $KEDGE_RELEASE/version)" = 3 ]
id -u deploy >/dev/null 2>&1 || useradd --create-home deploy
install -o deploy -m 0750 -d /var/lib/other
printf '[Service]\nType=oneshot\nExecStart=/bin/touch /run/helped\n' >/etc/systemd/system/helper.service
systemctl daemon-reload
systemctl start helper.service
test -e /run/helped
systemctl enable --quiet app.service
ln -sf /srv/app/bin/start /usr/local/bin/start
chown -R deploy: /var/lib/other
su deploy -s /bin/sh -c 'id -un' | grep -qx deploy
systemd-run --quiet --pipe --wait mount -t tmpfs none /mnt
grep -q ' /mnt ' /proc/1/mounts
logger "version $KEDGE_VERSION is in place"`

// units checks the units as they are installed.
func (m *machine) units() {
	m.t.Helper()
	units := strings.Fields(m.do("sh", "-c", "cd /usr/lib/systemd/system && ls kedge-*"))
	m.t.Logf("units: %s", strings.Join(units, " "))
	m.do("sh", "-c", "mkdir -p /etc/kedge && touch /etc/kedge/mirror.env")
	if out := m.do(append([]string{"systemd-analyze", "verify"}, units...)...); out != "" {
		m.t.Errorf("systemd-analyze verify:\n%s", out)
	}
	for _, unit := range []string{"kedge-agent", "kedge-mirror", "kedge-web"} {
		lines := strings.Split(m.do("systemd-analyze", "security", "--no-pager", unit), "\n")
		m.t.Log(strings.TrimSpace(lines[len(lines)-1]))
	}

	// The dashboard, set up as its unit says, and with a port of the system's choosing.
	m.do("sh", "-c", `umask 077; cd /etc/kedge; echo "$1" >web-token; echo "$2" >web.env
		mkdir -p /etc/systemd/system/kedge-web.service.d; echo "$3" >/etc/systemd/system/kedge-web.service.d/override.conf`, "sh",
		m.w.token("operator", deployments.RuleVars{}), strings.Join(m.client.Env(""), "\n"), `[Service]
LoadCredential=consul-token:/etc/kedge/web-token
Environment=CONSUL_HTTP_TOKEN_FILE=%d/consul-token
ExecStart=
ExecStart=/usr/bin/kedge web --listen 127.0.0.1:0`)
	m.do("systemctl", "daemon-reload")
	m.do("systemctl", "start", "kedge-web")
	await(m.t, "a page of the dashboard", func() error {
		log := m.do("journalctl", "--no-pager", "-u", "kedge-web", "--output=cat")
		url := regexp.MustCompile(`http://127\.0\.0\.1:[0-9]+/`).FindString(log)
		if url == "" {
			return fmt.Errorf("it hasn't said where it is: %s", log)
		}
		response, err := http.Get(url + "prod/" + m.name + "/app/" + m.name)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		page, err := io.ReadAll(response.Body)
		if err == nil && !strings.Contains(string(page), "as it should") {
			err = fmt.Errorf("%s: %s", response.Status, page)
		}
		return err
	})
	m.do("systemctl", "stop", "kedge-web")
	if result := m.show("kedge-web", "Result"); result != "success" {
		m.t.Errorf("the dashboard was stopped: %s", result)
	}
}

// testBootCut takes the machine's power away in mid-deployment, and boots it again.
func testBootCut(t *testing.T, m *machine) {
	// In the first deployment of all, before its switch.
	m.release(m.publish("1", pre("[ -e /var/log/cut ] || { touch /var/log/cut; sync; touch /run/pre; sleep 120; }")))
	m.boot()
	m.appears("/run/pre")
	m.cut()
	if _, err := os.Lstat(m.path("/srv/app")); !os.IsNotExist(err) {
		t.Errorf("dest is there before the switch: %v", err)
	}
	m.boot()
	m.runs("1")
	m.bootedInOrder()

	// In a fetch: at 4 MB/s this one takes seconds.
	m.release(m.publish("2", func(tree string, _ *deployments.Manifest) {
		data := make([]byte, 12<<20)
		rand.NewChaCha8([32]byte{}).Read(data)
		if err := os.WriteFile(filepath.Join(tree, "large"), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}))
	await(t, "a fetch under way", func() error { _, err := m.try("sh", "-c", "ls -d /srv/app.releases/.kedge/staging-*"); return err })
	m.cut()
	if version, err := os.ReadFile(m.path("/srv/" + m.live() + "/version")); err != nil || string(version) != "1\n" {
		t.Errorf("after a cut in a fetch %q is live: %v", version, err)
	}
	m.boot()
	m.runs("2")

	// After the switch, before the application is restarted; and while its health is awaited.
	for version, step := range map[string]change{
		"post": post("[ -e /var/log/cut2 ] || { touch /var/log/cut2; sync; touch /run/cut-post; sleep 120; }"),
		"health": func(_ string, m *deployments.Manifest) {
			m.Health.StableFor = 3 * time.Second
			post("touch /run/cut-health")("", m)
		},
	} {
		m.release(m.publish(version, step))
		m.appears("/run/cut-" + version)
		if version == "health" {
			m.answers(version)
		}
		m.cut()
		if got, err := os.ReadFile(m.path("/srv/" + m.live() + "/version")); err != nil || string(got) != version+"\n" {
			t.Errorf("after a cut in %s %q is live: %v", version, got, err)
		}
		m.boot()
		m.runs(version)
		m.bootedInOrder()
	}
}

// live is what dest leads to, on a machine that is off.
func (m *machine) live() string {
	m.t.Helper()
	to, err := os.Readlink(m.path("/srv/app"))
	if err != nil {
		m.t.Error(err)
	}
	return strings.TrimPrefix(to, "/srv/")
}

// testBootOutage boots a machine whose Consul is away.
func testBootOutage(t *testing.T, m *machine) {
	m.write("/etc/kedge/agent.yaml", strings.ReplaceAll(m.read("/etc/kedge/agent.yaml"), "ready_timeout: 40s", "ready_timeout: 2s"))
	m.release(m.publish("1"))

	m.client.Stop()
	m.boot()
	if state, _ := m.try("systemctl", "is-system-running", "--wait"); state != "degraded" {
		t.Errorf("the system is %s, want it degraded: the application has nothing to run", state)
	}
	m.is("multi-user.target", "active")
	m.is("kedge-agent", "active")
	if took := us(m.number("kedge-agent", "ActiveEnterTimestampMonotonic") - m.number("kedge-agent", "ExecMainStartTimestampMonotonic")); took < 2*time.Second || took > 20*time.Second {
		t.Errorf("the agent was ready after %s, want its timeout of 2 s", took)
	}
	if out, err := m.try("/usr/bin/kedge", "wait", "--ready", m.agent, "--timeout", "100ms"); err == nil || !strings.Contains(out, "503") {
		t.Errorf("kedge wait --ready while nothing is known: %v, %s", err, out)
	}
	m.client.Start()
	m.is("app", "active")
	m.do("systemctl", "reset-failed", "consumer")
	m.runs("1")

	m.client.Stop()
	m.powerOff()
	m.boot()
	m.answers("1")
	m.do("/usr/bin/kedge", "wait", "--ready", m.agent, "--timeout", "30s")
	m.bootedInOrder()
	if took := us(m.number("kedge-agent", "ActiveEnterTimestampMonotonic") - m.number("kedge-agent", "ExecMainStartTimestampMonotonic")); took >= 2*time.Second {
		t.Errorf("with a last known state the agent was ready after %s", took)
	}
	m.release(m.publish("2"))
	m.client.Start()
	m.runs("2")
}
