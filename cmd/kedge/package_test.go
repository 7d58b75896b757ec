package main

import (
	"bytes"
	"debug/buildinfo"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/deployments/tooltest"
)

// madeVersion is the version of the packages that the tests make.
const madeVersion = "1.2.3"

// makePackages runs .ci/package for some architectures, none: for all. The packages then lie in dir.
func makePackages(t *testing.T, dir string, architectures ...string) {
	t.Helper()
	c := exec.CommandContext(t.Context(), "../../.ci/package", append([]string{dir}, architectures...)...)
	c.Env = append(os.Environ(), "KEDGE_PACKAGE_VERSION="+madeVersion)
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf(".ci/package: %v\n%s", err, out)
	}
}

// madePackages are this architecture's packages, which two tests need.
var madePackages struct {
	once sync.Once
	dir  string
	made bool
}

func nativePackages(t *testing.T) string {
	t.Helper()
	madePackages.once.Do(func() {
		var err error
		if madePackages.dir, err = os.MkdirTemp("", "kedge-packages-"); err != nil {
			t.Fatal(err)
		}
		makePackages(t, madePackages.dir, runtime.GOARCH)
		madePackages.made = true
	})
	if !madePackages.made { // the other test, which made them, has failed
		t.Fatal("the packages could not be made: the other test that needs them says why")
	}
	return madePackages.dir
}

// debWithVersion returns the same package under another version: that is all that dpkg goes by.
func debWithVersion(t *testing.T, deb, version string) string {
	t.Helper()
	dir := t.TempDir()
	script := `dpkg-deb --raw-extract "$1" tree && sed -i "s/^Version: .*/Version: $2/" tree/DEBIAN/control && dpkg-deb -Znone --build tree "$2.deb"`
	c := exec.CommandContext(t.Context(), "sh", "-ec", script, "sh", deb, version)
	c.Dir = dir
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return filepath.Join(dir, version+".deb")
}

// The deb installs, upgrades and leaves a machine that systemd boots. An upgrade in mid-deployment, before the switch
// and after it, costs the application nothing; nor does the package's removal.
func TestPackage(t *testing.T) {
	t.Parallel()
	tooltest.NeedRoot(t)
	w := newWorld(t, "boot-package")
	w.startMirror("mirror-1")
	m := newMachine(t, w, "", "boot-package", "ready_timeout: 40s")
	debs, err := filepath.Glob(filepath.Join(nativePackages(t), "*.deb"))
	if err != nil || len(debs) != 1 {
		t.Fatalf("%q, %v: want one deb", debs, err)
	}
	for _, version := range []string{"1.0.0", "1.0.1", "1.0.2", "1.0.3"} {
		m.copy(debWithVersion(t, debs[0], version), "/var/log/"+version+".deb")
	}
	install := func(version string) {
		t.Helper()
		m.do("env", "DEBIAN_FRONTEND=noninteractive", "dpkg", "--install", "/var/log/"+version+".deb")
	}
	m.addMirror()
	m.boot()
	install("1.0.0")
	if state := m.show("kedge-agent", "ActiveState"); state != "inactive" {
		t.Errorf("after a first installation the agent is %s: that is the operator's to say", state)
	}
	if listed := m.do("dpkg", "--verify", "kedge"); listed != "" {
		t.Errorf("installed differently: %s", listed)
	}
	m.do("sh", "-c", "bash -n /usr/share/bash-completion/completions/kedge; test -e /usr/share/man/man1/kedge-agent.1")
	m.do("sh", "-ec", pageBlock(t, "install.md", "kedge-mirror.service.d"))
	await(t, "the mirror that the page starts has its token, and reads the repo", func() error {
		log := m.do("journalctl", "--no-pager", "--output=cat", "--unit=kedge-mirror")
		if !strings.Contains(log, "commit read") {
			return fmt.Errorf("it logs %s", log)
		}
		return nil
	})
	// Its notifications' secrets are files that only root can read.
	m.do("sh", "-ec", "umask 077; for name in notify.secret slack.url github.token; do echo x > /etc/kedge/$name; done")
	m.do("sh", "-ec", pageBlock(t, "notifications.md", "cat > /etc/kedge/notify.yaml"))
	m.do("sh", "-ec", pageBlock(t, "notifications.md", "kedge-mirror.service.d"))
	m.is("kedge-mirror", "active")
	m.do("sh", "-ec", `for file in $(sed -n 's/.*_file: //p' /etc/kedge/notify.yaml); do test "$(cat $file)" = x; done`)
	m.do("systemctl", "disable", "--now", "kedge-mirror") // its repo stays behind
	m.do("sh", "-ec", pageBlock(t, "install.md", "--no-block kedge-agent"))
	m.release(m.publish("1"))
	m.do("systemctl", "enable", "--now", "app.service")
	m.runs("1")

	for _, step := range []struct {
		name, deb, version string
		change             change
		appears            string
	}{
		{"before the switch", "1.0.1", "2", pre("touch /run/pre2; [ -e /run/go ] || sleep 30"), "/run/pre2"},
		{"after the switch", "1.0.2", "3", post("touch /run/post3; [ -e /run/go ] || sleep 30"), "/run/post3"},
	} {
		m.do("rm", "-f", "/run/go")
		agent := m.show("kedge-agent", "InvocationID")
		m.release(m.publish(step.version, step.change))
		m.appears(step.appears)
		began := time.Now()
		install(step.deb)
		if took := time.Since(began); took > 20*time.Second {
			t.Errorf("%s, the upgrade took %s: it waited for the deployment", step.name, took)
		}
		m.do("touch", "/run/go")
		m.runs(step.version)
		if m.show("kedge-agent", "InvocationID") == agent {
			t.Errorf("%s, the upgrade left the old agent running", step.name)
		}
	}

	// A release whose command upgrades the package: the agent's restart comes after the deployment's end.
	// The package is removed before the restarted agent is ready, and no failed unit stays.
	m.do("sh", "-ec", "cd /etc/systemd/system; mkdir -p kedge-agent.service.d; "+
		`printf '[Service]\nExecStartPre=-sleep 5\n' > kedge-agent.service.d/slow.conf`)
	agent := m.show("kedge-agent", "InvocationID")
	m.release(m.publish("4", post("dpkg --install /var/log/1.0.3.deb && touch /run/upgraded")))
	m.runs("4")
	m.appears("/run/upgraded")
	await(t, "the restart that the upgrade asked for", func() error {
		if got := m.show("kedge-agent", "InvocationID"); got == agent {
			return os.ErrExist
		}
		return nil
	})
	m.answers("4")

	app := m.show("app", "InvocationID")
	m.do("dpkg", "--remove", "kedge")
	m.answers("4")
	if m.show("app", "InvocationID") != app {
		t.Error("the removal restarted the application")
	}
	if state := m.show("kedge-agent", "ActiveState"); state != "inactive" {
		t.Errorf("after the removal the agent is %s", state)
	}
	m.do("test", "-d", "/var/lib/kedge", "-a", "!", "-e", "/usr/bin/kedge")
	install("1.0.3")
	m.do("systemctl", "enable", "--now", "kedge-agent.service")
	m.release(m.publish("5"))
	m.runs("5")
	m.do("dpkg", "--purge", "kedge")
	m.answers("5")
	m.do("test", "-e", "/srv/app/version", "-a", "-e", "/etc/kedge/agent.yaml", "-a", "!", "-e", "/var/lib/kedge")
}

// addMirror gives a machine what a reader of the manual's page install has before the mirror's service starts.
func (m *machine) addMirror() {
	m.t.Helper()
	if err := os.MkdirAll(m.path("/srv/git"), 0o755); err != nil {
		m.t.Fatal(err)
	}
	m.w.push("Nothing yet", nil)
	clone := exec.Command("git", "clone", "--quiet", "--bare", m.w.work, m.path("/srv/git/deployments.git"))
	if out, err := clone.CombinedOutput(); err != nil {
		m.t.Fatalf("%v: %s", err, out)
	}
	env := slices.Concat([]string{"KEDGE_REPO=/srv/git/deployments.git"}, m.client.Env(""), m.w.s3.Env())
	m.write("/etc/kedge/mirror.env", strings.Join(env, "\n")+"\n")
	m.write("/etc/kedge/mirror-token", m.w.token("mirror", deployments.RuleVars{Node: m.name}))
}

// pageBlock returns the block of commands of a page that has some text in it.
func pageBlock(t *testing.T, page, has string) string {
	t.Helper()
	text, err := os.ReadFile("../../deployments/docs/" + page)
	if err != nil {
		t.Fatal(err)
	}
	for i, block := range strings.Split(string(text), "```") {
		if _, commands, ok := strings.Cut(block, "\n"); i%2 == 1 && ok && strings.Contains(commands, has) {
			return commands
		}
	}
	t.Fatalf("%s has no block with %q", page, has)
	return ""
}

// What .ci/package makes is the same each time, and says what is in it.
func TestPackagesAreReproducible(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("builds packages: left out with -short")
	}
	first, second := t.TempDir(), nativePackages(t)
	makePackages(t, first)
	sums, err := os.ReadFile(filepath.Join(first, "SHA256SUMS"))
	if err != nil || bytes.Count(sums, []byte("\n")) != 8 {
		t.Fatalf("%s, %v: want a deb, an rpm, a tarball and an SBOM of two architectures", sums, err)
	}
	again, err := os.ReadFile(filepath.Join(second, "SHA256SUMS"))
	if err != nil || bytes.Count(again, []byte("\n")) != 4 {
		t.Fatalf("%s, %v", again, err)
	}
	for line := range bytes.Lines(again) {
		if !bytes.Contains(sums, line) {
			t.Errorf("made again it is another: %s", line)
		}
	}
	if out, err := exec.Command("sh", "-c", "cd "+first+" && sha256sum --check --strict SHA256SUMS").CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}

	sameFiles(t, first)
	tree := t.TempDir()
	archive := filepath.Join(first, "kedge_1.2.3_linux_"+runtime.GOARCH+".tar.gz")
	if out, err := exec.Command("tar", "-xf", archive, "-C", tree, "--strip-components=1").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	program := filepath.Join(tree, "kedge")
	info, err := buildinfo.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	if says, err := exec.Command(program, "version").CombinedOutput(); err != nil || string(says) != "v1.2.3\n" {
		t.Errorf("the program of the packages 1.2.3 says that it is %q, %v", says, err)
	}
	if size, err := os.Stat(program); err != nil || size.Size() > 36<<20 {
		t.Errorf("the program has %d bytes: want less than 36 MB", size.Size())
	}
	var bill struct {
		Components []struct{ Name, Version string }
	}
	text, err := os.ReadFile(filepath.Join(first, "kedge_1.2.3_"+runtime.GOARCH+".sbom.json"))
	if err == nil {
		err = json.Unmarshal(text, &bill)
	}
	if err != nil {
		t.Fatal(err)
	}
	listed := map[string]string{}
	for _, c := range bill.Components {
		listed[c.Name] = c.Version
	}
	for _, dep := range info.Deps {
		if listed[dep.Path] != dep.Version {
			t.Errorf("the SBOM has %s in version %q, the program %s", dep.Path, listed[dep.Path], dep.Version)
		}
	}
	for _, name := range []string{"man/man1/kedge.1", "man/man7/kedge-security.7", "systemd/kedge-agent.service", "docs/security.md"} {
		if _, err := os.Stat(filepath.Join(tree, name)); err != nil {
			t.Error(err)
		}
	}
}

// sameFiles checks that the rpm of each architecture installs what its deb does.
func sameFiles(t *testing.T, dir string) {
	t.Helper()
	debs, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil || len(debs) != 2 {
		t.Fatalf("%q, %v: want a deb of each architecture", debs, err)
	}
	for _, deb := range debs {
		arch := map[bool]string{true: "x86_64", false: "aarch64"}[strings.HasSuffix(deb, "amd64.deb")]
		rpms, err := filepath.Glob(filepath.Join(dir, "*"+arch+".rpm"))
		if err != nil || len(rpms) != 1 {
			t.Fatalf("%q, %v: want one rpm for %s", rpms, err, arch)
		}
		want, got := debFiles(t, deb), rpmFiles(t, rpms[0])
		// Each has its own place for zsh's completions.
		const debian, fedora = "/usr/share/zsh/vendor-completions/_kedge", "/usr/share/zsh/site-functions/_kedge"
		want[fedora] = want[debian]
		delete(want, debian)
		if len(want) < 50 || want["/usr/bin/kedge"].mode != 0o755 {
			t.Errorf("the deb holds %d files, kedge as %+v", len(want), want["/usr/bin/kedge"])
		}
		if !maps.Equal(want, got) {
			for name := range maps.Keys(want) {
				if want[name] != got[name] {
					t.Errorf("%s is %+v in the rpm, %+v in the deb", name, got[name], want[name])
				}
			}
			for name := range maps.Keys(got) {
				if _, ok := want[name]; !ok {
					t.Errorf("only the rpm holds %s", name)
				}
			}
		}
	}
}

// The examples of /etc/kedge are taken as they stand.
func TestConfigurationExamples(t *testing.T) {
	t.Parallel()
	for _, file := range []string{"etc/agent.yaml", "example/agent.yaml"} {
		c, err := readAgentConfig("../../deployments/"+file, origins{})
		if err != nil || c.Stage == "" || len(c.Roles) == 0 || len(c.Sources) == 0 {
			t.Errorf("%s is %+v, %v", file, c, err)
		}
	}
	for file, units := range map[string]string{
		"etc/agent.env": "kedge-agent", "etc/mirror.env": "kedge-mirror",
		"etc/web.env": "kedge-web", "example/mirror.env": "kedge-mirror",
	} {
		unit, err := os.ReadFile("../../deployments/systemd/" + units + ".service")
		if err != nil || !bytes.Contains(unit, []byte("/etc/kedge/"+filepath.Base(file)+"\n")) {
			t.Errorf("%s does not read %s: %v", units, file, err)
		}
		text, err := os.ReadFile("../../deployments/" + file)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			line = strings.TrimSpace(line)
			name, value, ok := strings.Cut(line, "=")
			if line != "" && line[0] != '#' && (!ok || value == "" || strings.ToUpper(name) != name) {
				t.Errorf("%s: %q: want NAME=VALUE", file, line)
			}
		}
	}
	if _, err := deployments.Load(os.DirFS("../../deployments/example/repo")); err != nil {
		t.Errorf("the example is no deployments repo any more: %v", err)
	}
}
