package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/artifact"
	"kedge/deployments"
	"kedge/deployments/tooltest"
	"kedge/kv/kvtest"
)

// machine is a Debian that systemd boots in a container, from the root that .ci/tools makes, with kedge, its units
// and an application installed as an operator would, in a role of its own. It shares the network of the test. Its
// disk outlives its boots.
type machine struct {
	t      testing.TB
	w      *world
	name   string // of its Consul node and of its role, too
	dir    string
	agent  string // where it listens
	app    string // where the application does
	client *kvtest.ConsulNode
	cmd    *exec.Cmd
	done   chan struct{}
	init   int                 // the process id of its systemd
	bad    deployments.Pointer // what failed here last, which may be in quarantine
}

const (
	// app is a service that the release starts: see kedge-apps.target.
	appUnit = `[Unit]
Description=An application that kedge deploys
[Service]
DynamicUser=yes
Environment=LISTEN=%s
ExecStart=/srv/app/bin/start
[Install]
WantedBy=kedge-apps.target
`
	// consumer needs the release in place, and isn't part of it. As it stops before the agent does, a shutdown that
	// has begun leaves the agent a second.
	consumerUnit = `[Unit]
Description=Needs what kedge deploys
Requires=kedge-converged.target
After=kedge-converged.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'cat /srv/app/version >>/var/log/consumer'
ExecStop=/bin/sleep 1
[Install]
WantedBy=multi-user.target
`
	// start serves the release's tree. The server stays in the directory that dest led to when it started: it has to
	// be started anew to serve another release, as most do.
	startScript = "#!/bin/sh\nexec /bin/busybox httpd -f -p $LISTEN -h \"${0%/*}/..\"\n"
)

// credential gives the agent its token as systemd does.
const credential = `[Service]
LoadCredential=consul-token:/etc/kedge/consul-token
Environment=CONSUL_HTTP_TOKEN_FILE=%d/consul-token
`

// newMachine installs a machine; w has a Consul client agent of its name. more are lines of agent.yaml. With an empty
// kedge, program and units are left for the test to install.
func newMachine(t testing.TB, w *world, kedge, name string, more ...string) *machine {
	t.Helper()
	m := &machine{t: t, w: w, name: name, dir: t.TempDir()}
	i := slices.IndexFunc(w.consul.Clients, func(n *kvtest.ConsulNode) bool { return n.Name == name })
	m.client = w.consul.Clients[i]
	m.agent, m.app = kvtest.FreeAddr(t, m.client.IP), kvtest.FreeAddr(t, m.client.IP)
	for _, dir := range []string{"root", "work", "upper/usr/bin", "upper/usr/lib/systemd/system", "upper/etc/kedge",
		"upper/etc/systemd/system/kedge-agent.service.d", "upper/var/log/journal"} {
		if err := os.MkdirAll(filepath.Join(m.dir, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(m.end)
	m.write("/usr/lib/systemd/system/app.service", fmt.Sprintf(appUnit, m.app))
	m.write("/usr/lib/systemd/system/consumer.service", consumerUnit)
	m.write("/etc/kedge/agent.yaml", strings.Join(append([]string{
		"stage: prod", "roles: [" + name + "]", "listen: " + m.agent,
		"sources: [" + w.s3.URL("") + "]", "dests: [/srv]",
	}, more...), "\n")+"\n")
	m.write("/etc/kedge/consul-token", w.token("agent", deployments.RuleVars{Node: name, Stage: "prod", Role: name}))
	env := slices.Concat(m.client.Env(""), w.s3.Env())
	if kedge == "" {
		env = append(env, "CONSUL_HTTP_TOKEN_FILE=/etc/kedge/consul-token")
		m.write("/etc/kedge/agent.env", strings.Join(env, "\n")+"\n")
		return m
	}
	m.write("/etc/kedge/agent.env", strings.Join(env, "\n")+"\n")
	m.write("/etc/systemd/system/kedge-agent.service.d/token.conf", credential) // as the unit's comment says
	m.copy(kedge, "/usr/bin/kedge")
	units, err := filepath.Glob("../../deployments/systemd/*")
	if err != nil || len(units) == 0 {
		t.Fatalf("no units to install: %v", err)
	}
	for _, unit := range units {
		m.copy(unit, "/usr/lib/systemd/system/"+filepath.Base(unit))
	}
	enable := exec.Command("systemctl", "--root="+filepath.Join(m.dir, "upper"), "enable", "kedge-agent.service", "app.service", "consumer.service")
	if out, err := enable.CombinedOutput(); err != nil {
		t.Fatalf("enable the units: %v\n%s", err, out)
	}
	return m
}

// path is where a file that was written to the machine's disk lies on this one. Nothing is changed there while it runs.
func (m *machine) path(name string) string { return filepath.Join(m.dir, "upper", name) }

func (m *machine) write(name, text string) {
	m.t.Helper()
	mode := os.FileMode(0o644)
	if strings.Contains(name, "token") || strings.HasSuffix(name, ".env") {
		mode = 0o600
	}
	if err := os.WriteFile(m.path(name), []byte(text), mode); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) read(name string) string {
	m.t.Helper()
	text, err := os.ReadFile(m.path(name))
	if err != nil {
		m.t.Fatal(err)
	}
	return string(text)
}

func (m *machine) copy(from, to string) {
	m.t.Helper()
	if out, err := exec.Command("cp", "--preserve=mode", from, m.path(to)).CombinedOutput(); err != nil {
		m.t.Fatalf("%v: %s", err, out)
	}
}

// bootScript boots, in namespaces of its own: they take all processes and mounts along when the first process ends,
// however it ends.
const bootScript = `set -e
for group in $CGROUPS; do echo $$ >"$group/cgroup.procs"; done
exec unshare --mount --propagation private --pid --fork --kill-child=SIGKILL --mount-proc sh -ec '
	mount -t overlay -o "lowerdir=$LOWER,upperdir=$DIR/upper,workdir=$DIR/work" overlay "$DIR/root"
	exec systemd-nspawn --quiet --register=no --keep-unit --machine="$MACHINE" --directory="$DIR/root" --console=pipe --boot'`

// boot switches the machine on, and returns when its systemd answers.
func (m *machine) boot() {
	m.t.Helper()
	console, err := os.OpenFile(filepath.Join(m.dir, "console"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		m.t.Fatal(err)
	}
	defer console.Close()
	for _, group := range m.groups() {
		if err := os.MkdirAll(group, 0o755); err != nil {
			m.t.Fatalf("tests that boot a machine need root: %v", err)
		}
	}
	m.cmd = exec.Command("sh", "-c", bootScript)
	m.cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "CGROUPS=" + strings.Join(m.groups(), " "),
		"LOWER=" + tooltest.Path(m.t, "boot-root"), "DIR=" + m.dir, "MACHINE=" + m.name,
	}
	m.cmd.Stdout, m.cmd.Stderr = console, console
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := m.cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	m.done = make(chan struct{})
	go func(cmd *exec.Cmd, done chan struct{}) { cmd.Wait(); close(done) }(m.cmd, m.done)
	await(m.t, "the boot of "+m.name, func() error {
		if !m.running() {
			m.t.Fatalf("%s did not boot: %s", m.name, m.console())
		}
		if m.init = m.findInit(); m.init == 0 {
			return fmt.Errorf("it has no processes yet")
		}
		_, err := m.try("systemctl", "show", "--property=Version")
		return err
	})
}

// groups are the machine's control groups, in each hierarchy that systemd uses.
func (m *machine) groups() []string {
	var groups []string
	for _, hierarchy := range []string{"/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
		if _, err := os.Stat(hierarchy + "/cgroup.procs"); err == nil {
			groups = append(groups, fmt.Sprintf("%s/kedge-boot-%d-%s", hierarchy, os.Getpid(), m.name))
		}
	}
	return groups
}

// findInit looks for the process that is the first one of the inner of two process namespaces.
func (m *machine) findInit() int {
	for _, nspawn := range children(m.cmd.Process.Pid) {
		for _, pid := range children(nspawn) {
			status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
			if err != nil {
				continue
			}
			for line := range strings.Lines(string(status)) {
				if ids, ok := strings.CutPrefix(line, "NSpid:"); ok && len(strings.Fields(ids)) >= 3 && strings.HasSuffix(strings.TrimSpace(ids), "\t1") {
					return pid
				}
			}
		}
	}
	return 0
}

func children(pid int) (pids []int) {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, task := range tasks {
		list, _ := os.ReadFile(task)
		for field := range strings.FieldsSeq(string(list)) {
			if n, err := strconv.Atoi(field); err == nil {
				pids = append(pids, n)
			}
		}
	}
	return pids
}

func (m *machine) running() bool {
	if m.cmd == nil {
		return false
	}
	select {
	case <-m.done:
		return false
	default:
		return true
	}
}

// cut takes the machine's power away.
func (m *machine) cut() {
	if m.running() {
		m.cmd.Process.Kill()
		<-m.done
	}
	// Everything in it is dead; a group is empty once the kernel has reaped the last.
	for _, group := range m.groups() {
		deadline := time.Now().Add(10 * time.Second)
		for err := removeGroup(group); err != nil; err = removeGroup(group) {
			if time.Now().After(deadline) {
				m.t.Errorf("left behind: %v", err)
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
}

func removeGroup(group string) error {
	inner, err := os.ReadDir(group)
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	for _, entry := range inner {
		if !entry.IsDir() { // a file of the group's settings
			continue
		}
		if err := removeGroup(filepath.Join(group, entry.Name())); err != nil {
			return err
		}
	}
	if err := os.Remove(group); err != nil && !os.IsNotExist(err) {
		return err
	}
	return nil
}

// powerOff shuts the machine down in order.
func (m *machine) powerOff() {
	m.t.Helper()
	m.do("systemctl", "poweroff")
	select {
	case <-m.done:
	case <-time.After(60 * time.Second):
		m.t.Fatalf("%s does not shut down: %s", m.name, m.console())
	}
	m.cut()
}

func (m *machine) end() {
	if m.t.Failed() && m.running() {
		log, _ := m.try("sh", "-c", "systemctl --no-pager list-jobs; systemctl --no-pager --failed; journalctl --no-pager -o short-monotonic -n 150 -u kedge-agent -u app -u consumer")
		m.t.Logf("log of %s:\n%s", m.name, log)
	}
	m.cut()
}

func (m *machine) console() string {
	log, _ := os.ReadFile(filepath.Join(m.dir, "console"))
	return string(log)
}

// try runs a command on the machine, as root, and gives what it printed.
func (m *machine) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	enter := []string{"--target", strconv.Itoa(m.init), "--mount", "--uts", "--ipc", "--pid", "--cgroup", "--root", "--wd"}
	c := exec.CommandContext(ctx, "nsenter", append(enter, args...)...)
	c.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	c.WaitDelay = time.Second
	err := c.Run()
	text := strings.TrimSpace(out.String())
	if err != nil {
		err = fmt.Errorf("%s on %s: %w: %s", strings.Join(args, " "), m.name, err, text)
	}
	return text, err
}

func (m *machine) do(args ...string) string {
	m.t.Helper()
	out, err := m.try(args...)
	if err != nil {
		m.t.Fatal(err)
	}
	return out
}

// show gives a property of a unit, and number one that is a number; times are in microseconds since the boot.
func (m *machine) show(unit, property string) string {
	m.t.Helper()
	return m.do("systemctl", "show", "--value", "--property="+property, unit)
}

func (m *machine) number(unit, property string) int64 {
	m.t.Helper()
	text := m.show(unit, property)
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		m.t.Fatalf("%s of %s is %q", property, unit, text)
	}
	return n
}

// is waits until a unit is in a state, as in "active".
func (m *machine) is(unit, state string) {
	m.t.Helper()
	await(m.t, fmt.Sprintf("%s on %s is %s", unit, m.name, state), func() error {
		if got := m.show(unit, "ActiveState"); got != state {
			return fmt.Errorf("it is %s", got)
		}
		return nil
	})
}

// publish publishes a version of the application; change may alter its tree and its manifest.
func (m *machine) publish(version string, change ...func(tree string, manifest *deployments.Manifest)) deployments.Pointer {
	m.t.Helper()
	tree := filepath.Join(m.t.TempDir(), "tree")
	for name, text := range map[string]string{"version": version + "\n", "bin/start": startScript} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(tree, name)), 0o755); err != nil {
			m.t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(tree, name), []byte(text), 0o755); err != nil {
			m.t.Fatal(err)
		}
	}
	manifest := deployments.Manifest{
		Name: m.name, Version: version, Strategy: deployments.StrategyRelease, Dest: "/srv/app", DestMode: 0o755,
		Commands: deployments.Commands{Post: []deployments.Command{{Run: "systemctl restart app"}}},
		Health: deployments.Health{Timeout: 20 * time.Second, Checks: []deployments.Check{
			{Systemd: "app.service", Interval: 100 * time.Millisecond},
			{HTTP: &deployments.HTTPCheck{URL: m.url("version"), Contains: version + "\n"}, Interval: 100 * time.Millisecond},
		}},
	}
	for _, f := range change {
		f(tree, &manifest)
	}
	published, err := artifact.Publish(m.t.Context(), m.w.objects, artifact.PublishOptions{Dir: tree, To: m.w.s3.URL("releases"), Manifest: manifest})
	if err != nil {
		m.t.Fatalf("publish %s %s: %v", m.name, version, err)
	}
	return published.Pointer
}

// release pushes a commit that asks for p on this machine.
func (m *machine) release(p deployments.Pointer) {
	m.t.Helper()
	content := "release: " + p.String() + "\n"
	m.w.pushing.Lock()
	defer m.w.pushing.Unlock()
	m.w.push("for "+m.name, map[string]*string{m.id().String(): &content})
}

func (m *machine) id() deployments.UnitID {
	return deployments.UnitID{Stage: "prod", Role: m.name, Unit: "app"}
}

func (m *machine) url(path string) string { return "http://" + m.app + "/" + path }

// get asks url once; an answer that isn't 200 is an error.
func get(url string) (string, error) {
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", response.Status, body)
	}
	return string(body), err
}

// answers waits until the application itself answers with a version.
func (m *machine) answers(version string) {
	m.t.Helper()
	await(m.t, fmt.Sprintf("%s on %s answers", version, m.name), func() error {
		got, err := get(m.url("version"))
		if err == nil && strings.TrimSpace(got) != version {
			err = fmt.Errorf("%q answers", got)
		}
		return err
	})
}
