package main

import (
	"cmp"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"kedge/deployments/tooltest"
)

// block is a block of commands of a page: ```sh runs as it stands, ```sh daemon beside what follows it, and any other
// is for people's eyes.
type block struct {
	line   int
	daemon bool
	text   string
}

func blocksOf(page string) (blocks []block) {
	open := false
	for i, line := range strings.Split(page, "\n") {
		fence, ok := strings.CutPrefix(strings.TrimSpace(line), "```")
		switch {
		case ok && !open && (fence == "sh" || fence == "sh daemon"):
			open = true
			blocks = append(blocks, block{line: i + 2, daemon: fence == "sh daemon"})
		case ok:
			open = false
		case open:
			blocks[len(blocks)-1].text += line + "\n"
		}
	}
	return blocks
}

// A block that names a command of a shell is marked sh, so that it runs, or text where nothing here could run it: what
// takes a package, a systemd or a load balancer of the reader's own.
func TestDocsAreRun(t *testing.T) {
	t.Parallel()
	pages, err := filepath.Glob("../../deployments/docs/*.md")
	if err != nil || len(pages) == 0 {
		t.Fatalf("no pages: %v", err)
	}
	pages = append(pages, "../../README.md", "../../deployments/example/README.md")
	programs := "kedge|git|consul|systemctl|systemd-creds|promtool|install|ln|curl|s5cmd|aws|dpkg"
	command := regexp.MustCompile(`^ *(?:` + programs + `) [a-z-]`)
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		fence, inFence := "", false
		for i, line := range strings.Split(string(text), "\n") {
			mark, ok := strings.CutPrefix(strings.TrimSpace(line), "```")
			switch {
			case ok:
				fence, inFence = mark, !inFence
			case !command.MatchString(line):
			case inFence && fence != "sh" && fence != "sh daemon" && fence != "text":
				t.Errorf("%s:%d: %q stands in a block that is neither sh nor text", page, i+1, line)
			case !inFence && strings.HasPrefix(line, "    ") && !strings.Contains(line, "─"): // that is a drawing
				t.Errorf("%s:%d: %q is in no block of commands: mark it ```sh", page, i+1, line)
			}
		}
		for _, block := range blocksOf(string(text)) {
			if !slices.Contains(slices.Collect(maps.Values(runPages)), strings.TrimPrefix(page, "../../")) {
				t.Errorf("%s:%d: no test runs this block: add the page to runPages", page, block.line)
			}
		}
	}
}

// runPages are the pages whose blocks TestDocs runs.
var runPages = map[string]string{
	"README":        "README.md",
	"install":       "deployments/docs/install.md",
	"autoscaling":   "deployments/docs/autoscaling.md",
	"operations":    "deployments/docs/operations.md",
	"hooks":         "deployments/docs/hooks.md",
	"example":       "deployments/example/README.md",
	"browser":       "deployments/docs/browser.md",
	"git-servers":   "deployments/docs/git-servers.md",
	"metrics":       "deployments/docs/metrics.md",
	"migrating":     "deployments/docs/migrating.md",
	"notifications": "deployments/docs/notifications.md",
	"security":      "deployments/docs/security.md",
}

// listens reports whether the agent of a page's script listens where the page says, at a port of this machine. Such
// pages take turns.
func listens(script string) bool {
	return strings.Contains(script, "kedge agent") &&
		(strings.Contains(script, "agent.yaml") || strings.Contains(script, "--listen"))
}

// takesConsulBack reports whether a page's script restores Consul as a whole, as of a moment before. Such a page has a
// Consul of its own, and its keys are those that it names.
func takesConsulBack(script string) bool { return strings.Contains(script, "consul snapshot restore") }

// readerHas is what the reader of a page has before the page begins.
var readerHas = map[string]string{
	"git-servers":   aRepo,
	"migrating":     aRepo + stretchersManifest,
	"operations":    aRepo + aUnit,
	"notifications": aRepo + "cd /etc/kedge; echo https://hooks.slack.example/1 > slack.url; echo token > github.token",
}

const (
	aRepo = `
git init --quiet --bare -b main /srv/git/deployments.git
git clone --quiet /srv/git/deployments.git ~/deployments
echo 'prune: true' > ~/deployments/kedge.yaml
git -C ~/deployments add .
git -C ~/deployments commit --quiet -m 'settings'
git -C ~/deployments push --quiet
`
	aUnit = `
mkdir -p ~/deployments/prod/web
digest=$(echo 1 | sha256sum | cut -d' ' -f1)
cat > ~/deployments/prod/web/app.yaml <<END
release: s3://acme-releases/app/1/manifest.yaml@sha256:$digest
rollout: {canary: 1}
END
git -C ~/deployments add .
git -C ~/deployments commit --quiet -m 'a unit'
git -C ~/deployments push --quiet
kedge mirror /srv/git/deployments.git >~/daemon.0.log 2>&1 &
for i in $(seq 300); do kedge history prod/web/app >/dev/null 2>&1 && exit; sleep 0.1; done
exit 1
`
	stretchersManifest = `
mkdir ~/tree && echo 1 > ~/tree/version && tar czf ~/app-1.tar.gz -C ~/tree .
cat > ~/manifest_web_prod.yml <<END
src: s3://acme-deploy/archives/app-1.tar.gz
checksum: $(sha256sum ~/app-1.tar.gz | cut -d' ' -f1)
dest: /srv/app
END
s5cmd --endpoint-url $AWS_ENDPOINT_URL_S3 cp ~/app-1.tar.gz s3://acme-deploy/archives/
s5cmd --endpoint-url $AWS_ENDPOINT_URL_S3 cp ~/manifest_web_prod.yml s3://acme-deploy/manifests/
`
)

// docScript makes one script of a page's blocks. A daemon counts as started when it says so; it ends with the script.
func docScript(name, has string, blocks []block) string {
	var b strings.Builder
	b.WriteString(`set -euo pipefail
trap 'code=$?; [ $code = 0 ] || tail -n 30 $HOME/daemon.*.log >&2 || true; kill $(jobs -p) 2>/dev/null || true; wait || true; exit $code' EXIT
`)
	fmt.Fprintf(&b, "(%s\n)\n", cmp.Or(has, ":"))
	for _, block := range blocks {
		fmt.Fprintf(&b, "echo '== %s:%d' >&2\n", name, block.line)
		if !block.daemon {
			b.WriteString(block.text)
			continue
		}
		log := fmt.Sprintf("$HOME/daemon.%d.log", block.line)
		if strings.HasPrefix(block.text, "consul watch") { // it says nothing until an event comes
			fmt.Fprintf(&b, "( exec %s\n) >%s 2>&1 &\n", strings.TrimSpace(block.text), log)
			continue
		}
		fmt.Fprintf(&b, `( %s
) >%s 2>&1 &
for i in $(seq 300); do grep -qE ' starts|is at http' %s && break; kill -0 $! || exit 1; sleep 0.1; done
`, strings.TrimSpace(block.text), log, log)
	}
	return b.String()
}

// Every block of commands that a page of the manual marks as sh runs as it stands, from the first to the last, on a real
// Consul that denies by default, S3, Git, and daemons; below directories that the page's reader would write to.
func TestDocs(t *testing.T) {
	t.Parallel()
	tooltest.NeedRoot(t)
	w := newWorld(t, "web-1")
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	kedge := releasedProgram(t)
	bucket := exec.Command(tooltest.Path(t, "s5cmd"), "--endpoint-url", w.s3.Endpoint(), "mb")
	for _, name := range []string{"s3://acme-releases", "s3://acme-deploy"} {
		c := exec.Command(bucket.Path, append(bucket.Args[1:], name)...)
		c.Env = slices.Concat(baseEnv(), w.s3.Env())
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("make a bucket: %v\n%s", err, out)
		}
	}
	// Something that a stolen token may not read.
	w.consul.CLI(w.consul.RootToken, "", "kv", "put", "kedge/pins/prod/db/main", "hold")
	var port sync.Mutex
	for name, page := range runPages {
		text, err := os.ReadFile(filepath.Join(root, page))
		if err != nil {
			t.Fatal(err)
		}
		blocks := blocksOf(string(text))
		if len(blocks) == 0 {
			t.Errorf("%s has no commands", page)
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := w
			script := docScript(page, readerHas[name], blocks)
			if takesConsulBack(script) {
				w = newWorld(t, "web-1")
			}
			if listens(script) {
				port.Lock()
				defer port.Unlock()
			}
			runDoc(t, w, kedge, root, name, script)
		})
	}
}

// runDoc runs a page's script in namespaces of its own. A page has a prefix in Consul, too, but for the one that names keys.
func runDoc(t *testing.T, w *world, kedge, root, name, script string) {
	t.Helper()
	home := t.TempDir()
	tools := filepath.Join(home, "tools")
	for _, dir := range []string{tools, filepath.Join(home, "bin")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range map[string]string{
		"kedge": kedge, "consul": tooltest.Path(t, "consul"), "s5cmd": tooltest.Path(t, "s5cmd"),
		"promtool": tooltest.Path(t, "promtool"),
	} {
		if err := os.Symlink(target, filepath.Join(tools, name)); err != nil {
			t.Fatal(err)
		}
	}
	writeIdentity(t, home)
	// Directories that a reader would have, of this run's own. All ends with the first process of the namespace.
	prefix := name + "/"
	if name == "autoscaling" || takesConsulBack(script) {
		prefix = ""
	}
	inside := `set -e
mkdir -p /etc/kedge /var/lib/kedge /run/kedge /srv
for dir in /etc/kedge /var/lib/kedge /run/kedge /srv; do mount -t tmpfs -o mode=0755 tmpfs $dir; done
mount --bind "$HOME/bin" /usr/local/bin
cp "$HOME"/identity.* /run/kedge/
mkdir "$HOME/kedge" && cd "$HOME/kedge" # a clone of the repo
for entry in "$ROOT"/*; do ln -s "$entry" .; done
exec bash "$HOME/script"`
	if err := os.WriteFile(filepath.Join(home, "script"), []byte(script), 0o644); err != nil {
		t.Fatal(err)
	}
	c := exec.CommandContext(t.Context(), "unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc", "sh", "-c", inside)
	c.Env = slices.Concat(baseEnv(), w.consul.Clients[0].Env(w.consul.RootToken), w.s3.Env(), []string{
		"HOME=" + home, "ROOT=" + root, "PATH=" + tools + ":/usr/local/bin:" + os.Getenv("PATH"),
		"KEDGE_PREFIX=" + prefix, "GOCACHE=" + goEnv(t, "GOCACHE"), "GOMODCACHE=" + goEnv(t, "GOMODCACHE"), "GOFLAGS=-buildvcs=false",
		"GIT_AUTHOR_NAME=Dev", "GIT_AUTHOR_EMAIL=dev@example.com", "GIT_COMMITTER_NAME=Dev", "GIT_COMMITTER_EMAIL=dev@example.com",
		"GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null",
	})
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	began := time.Now()
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%s in %s", name, time.Since(began).Round(100*time.Millisecond))
}

func goEnv(t *testing.T, name string) string {
	t.Helper()
	out, err := exec.Command("go", "env", name).Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}
