package command

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/deployments/safetext"
)

func run(t *testing.T, c deployments.Command, env Env, stdin []byte) (Result, error) {
	t.Helper()
	return Run(t.Context(), slog.New(slog.DiscardHandler), c, env, stdin)
}

func TestOutputExitAndStdin(t *testing.T) {
	t.Parallel()
	r, err := run(t, deployments.Command{Run: "cat; echo err >&2"}, Env{}, []byte("in\n"))
	if err != nil || r.Exit != 0 || string(r.Output) != "in\nerr\n" {
		t.Errorf("got %q, exit %d, %v", r.Output, r.Exit, err)
	}
	r, err = run(t, deployments.Command{Run: "echo why; exit 3"}, Env{}, nil)
	if err == nil || r.Exit != 3 || !strings.Contains(err.Error(), "exit status 3: why") {
		t.Errorf("got exit %d, %v", r.Exit, err)
	}
	// A command that reads nothing of a large stdin is no failure.
	if _, err := run(t, deployments.Command{Run: "true"}, Env{}, make([]byte, 1<<20)); err != nil {
		t.Error(err)
	}
	if _, err := run(t, deployments.Command{Run: "read x"}, Env{}, nil); err == nil {
		t.Error("without stdin, read finds something")
	}
}

func TestEnvironment(t *testing.T) {
	t.Parallel()
	env := Env{
		Unit: deployments.UnitID{Stage: "prod", Role: "web", Unit: "app"}, Node: "n1", Step: "post", Release: "/r", Previous: "/p",
		Dest: "/d", Digest: deployments.Digest{1}, Name: "app", Version: "2", Commit: "c0ffee", Error: "it broke", Run: "mark",
	}
	r, err := run(t, deployments.Command{Run: "env | grep ^KEDGE_ | sort"}, env, nil)
	want := `KEDGE_COMMIT=c0ffee
KEDGE_DEST=/d
KEDGE_DIGEST=` + env.Digest.String() + `
KEDGE_ERROR=it broke
KEDGE_NAME=app
KEDGE_NODE=n1
KEDGE_PREVIOUS=/p
KEDGE_RELEASE=/r
KEDGE_ROLE=web
KEDGE_RUN=mark
KEDGE_STAGE=prod
KEDGE_STEP=post
KEDGE_UNIT=app
KEDGE_VERSION=2
`
	if err != nil || string(r.Output) != want {
		t.Errorf("got %v\n%s", err, r.Output)
	}
	r, err = run(t, deployments.Command{Run: "env | grep ^KEDGE_ | grep -v =$; env | grep ^KEDGE_ | wc -l"}, Env{}, nil)
	if err != nil || strings.TrimSpace(string(r.Output)) != "13" {
		t.Errorf("with nothing to say: %v\n%s", err, r.Output)
	}
}

// A command's last line becomes an error, which later commands find in their environment: that can't hold a NUL,
// and a terminal that shows it is not to obey it.
func TestLastLineIsText(t *testing.T) {
	t.Parallel()
	_, err := run(t, deployments.Command{Run: `printf 'a\0b\033[2Jc\td\377'; exit 1`}, Env{}, nil)
	if err == nil || !strings.HasSuffix(err.Error(), "exit status 1: a\ufffdb\ufffd[2Jc d\ufffd") {
		t.Errorf("got %q", err)
	}
	if _, err := run(t, deployments.Command{Run: `printf 'begin\n10%%\r20%%\r\n'; exit 1`}, Env{}, nil); err == nil || !strings.HasSuffix(err.Error(), "status 1: 20%") {
		t.Errorf("of what was written over: %q", err)
	}
	r, err := run(t, deployments.Command{Run: `echo "$KEDGE_ERROR"`}, Env{Error: "a\x00b"}, nil)
	if err != nil || string(r.Output) != "a\ufffdb\n" {
		t.Errorf("with a NUL in the environment: %q, %v", r.Output, err)
	}
}

func TestSecretsStayWithTheAgent(t *testing.T) {
	t.Parallel()
	agent := []string{
		"CONSUL_HTTP_TOKEN=s", "CONSUL_HTTP_TOKEN_FILE=/s", "CONSUL_HTTP_ADDR=127.0.0.1:8500", "KEDGE_WEBHOOK_SECRET=s",
		"NOTIFY_SOCKET=/s", "AWS_SECRET_ACCESS_KEY=s", "AWS_REGION=eu", "HOME=/root",
	}
	own := environ(agent, nil, Env{})
	for _, kv := range []string{"CONSUL_HTTP_ADDR=127.0.0.1:8500", "AWS_SECRET_ACCESS_KEY=s", "HOME=/root", "PATH=" + defaultPath} {
		if !slices.Contains(own, kv) {
			t.Errorf("the agent's user lacks %s", kv)
		}
	}
	for _, kv := range own {
		for _, bad := range []string{"CONSUL_HTTP_TOKEN", "KEDGE_WEBHOOK", "NOTIFY_SOCKET"} {
			if strings.HasPrefix(kv, bad) {
				t.Errorf("%s got through", kv)
			}
		}
	}
	theirs := []string{
		"AWS_REGION=eu", "CONSUL_HTTP_ADDR=127.0.0.1:8500", "LANG=C", "NO_PROXY=10.0.0.0/8",
		"https_proxy=http://proxy:3128", "ftp_proxy=proxy:3128", "RAILS_ENV=production",
	}
	ours := []string{ // each beginning occurs in a name that has no other reason to be kept back
		"AWS_SECRET_ACCESS_KEY=s", "AWS_PROFILE=admin", "AWS_CONFIG_FILE=/s", "CONSUL_CACERT=/s",
		"GOOGLE_OAUTH_ACCESS_TOKEN=s", "GOOGLE_APPLICATION_CREDENTIALS=/s", "GOOGLE_CLOUD_QUOTA_PROJECT=p",
		"GCLOUD_PROJECT=p", "CLOUDSDK_CONFIG=/s", "GCE_METADATA_HOST=h", "AZURE_CLIENT_ID=s", "ARM_CLIENT_ID=s",
		"VAULT_ADDR=https://v", "NOMAD_ADDR=https://n", "DOCKER_HOST=unix:///s", "KUBECONFIG=/s", "GIT_ASKPASS=/s",
		"SSH_AUTH_SOCK=/s", "SSH_AGENT_PID=7", "GPG_AGENT_INFO=/s", "NETRC=/s", "NPM_CONFIG_USERCONFIG=/s",
		"DBUS_SESSION_BUS_ADDRESS=unix:path=/s", "XDG_RUNTIME_DIR=/run/user/0",
		"HTTPS_PROXY=http://user:s@proxy:3128", "http_proxy=http://user:s@proxy", "ALL_PROXY=user:s@proxy:3128",
		"DATABASE_PASSWORD=s", "GITHUB_TOKEN=s", "SIGNING_KEY=s", "MIRROR_URL=https://h/x?token=s",
	}
	for _, prefix := range agentOnlyPrefixes {
		if !slices.ContainsFunc(ours, func(kv string) bool {
			name, value, _ := strings.Cut(kv, "=")
			return strings.HasPrefix(name, prefix) && !deployments.SecretName(name) && safetext.URLs(value) == value
		}) {
			t.Errorf("no variable is kept back for its beginning %s alone", prefix)
		}
	}
	other := environ(slices.Concat(agent, theirs, ours), []string{"HOME=/home/deploy"}, Env{Vars: map[string]string{"OWN_TOKEN": "x"}})
	for _, kv := range append(theirs, "OWN_TOKEN=x", "HOME=/home/deploy") {
		if !slices.Contains(other, kv) {
			t.Errorf("another user lacks %s", kv)
		}
	}
	for _, kv := range ours {
		if slices.Contains(other, kv) {
			t.Errorf("another user gets %s", kv)
		}
	}
}

func TestUser(t *testing.T) {
	t.Parallel()
	self, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	if r, err := run(t, deployments.Command{Run: "id -u", User: self.Username}, Env{}, nil); err != nil || strings.TrimSpace(string(r.Output)) != self.Uid {
		t.Errorf("as oneself: %q, %v", r.Output, err)
	}
	if _, err := run(t, deployments.Command{Run: "id", User: "no-such-user"}, Env{}, nil); err == nil || !strings.Contains(err.Error(), "no-such-user") {
		t.Errorf("an unknown user: %v", err)
	}
	if os.Geteuid() != 0 {
		if _, err := run(t, deployments.Command{Run: "id", User: "nobody"}, Env{}, nil); !errors.Is(err, os.ErrPermission) {
			t.Errorf("another user, without being root: %v", err)
		}
		return
	}
	for name, want := range map[string]string{
		"nobody":     "65534 65534 nobody nobody",
		"65534":      "65534 65534 nobody nobody",
		"4000000001": "4000000001 4000000001  ",
	} {
		r, err := run(t, deployments.Command{Run: `echo "$(id -u) $(id -G) $USER $LOGNAME"`, User: name}, Env{}, nil)
		if err != nil || strings.TrimSuffix(string(r.Output), "\n") != want {
			t.Errorf("%s: %q, %v; want %q", name, r.Output, err, want)
		}
	}
}

// awaitGone waits until no process has the id.
func awaitGone(t *testing.T, pid int) {
	t.Helper()
	for begin := time.Now(); syscall.Kill(pid, 0) == nil; time.Sleep(10 * time.Millisecond) {
		if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil && strings.Contains(string(stat), ") Z ") {
			return // dead; reaping it is its new parent's task
		}
		if time.Since(begin) > 10*time.Second {
			t.Fatalf("process %d lives on", pid)
		}
	}
}

func pidIn(t *testing.T, file string) int {
	t.Helper()
	for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		data, _ := os.ReadFile(file)
		if pid, err := strconv.Atoi(strings.TrimSpace(string(data))); err == nil && bytes.HasSuffix(data, []byte("\n")) {
			return pid
		}
		if time.Since(begin) > 10*time.Second {
			t.Fatalf("no process id in %s", file)
		}
	}
}

func TestTimeoutEndsTheWholeGroup(t *testing.T) {
	t.Parallel()
	for name, script := range map[string]string{
		"obedient":        `sleep 1000 & echo $! > PID; sleep 1000`,
		"ignores SIGTERM": `trap "" TERM; (trap "" TERM; sleep 1000) & echo $! > PID; while :; do sleep 1; done`,
		"child outlives":  `(trap "" TERM; sleep 1000) & echo $! > PID; sleep 1000`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			file := filepath.Join(t.TempDir(), "pid")
			begin := time.Now()
			r, err := run(t, deployments.Command{Run: strings.ReplaceAll(script, "PID", file), Timeout: 300 * time.Millisecond}, Env{}, nil)
			if !errors.Is(err, ErrTimeout) || r.Exit == 0 {
				t.Errorf("got exit %d, %v", r.Exit, err)
			}
			if took := time.Since(begin); took > 30*time.Second {
				t.Errorf("took %s", took)
			}
			awaitGone(t, pidIn(t, file))
		})
	}
}

// All of the group is asked before it is killed: what it does about that, such as rolling back, gets its time.
func TestTimeoutAsksTheWholeGroup(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	pid, asked := filepath.Join(dir, "pid"), filepath.Join(dir, "asked")
	script := fmt.Sprintf(`(trap "echo yes > %s; exit" TERM; echo $$ > %s; while :; do sleep 0.05; done) & sleep 1000`, asked, pid)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for ctx.Err() == nil {
			if _, err := os.Stat(pid); err == nil {
				cancel()
			}
			time.Sleep(5 * time.Millisecond)
		}
	}()
	if _, err := Run(ctx, slog.New(slog.DiscardHandler), deployments.Command{Run: script}, Env{}, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(asked); err != nil {
		t.Errorf("a process of the group was not asked to end: %v", err)
	}
}

func TestCancelEndsTheCommand(t *testing.T) {
	t.Parallel()
	superseded := errors.New("superseded")
	ctx, cancel := context.WithCancelCause(t.Context())
	file := filepath.Join(t.TempDir(), "pid")
	go func() {
		for { // t.Fatal is not for this goroutine
			if data, _ := os.ReadFile(file); len(data) > 0 {
				cancel(superseded)
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
	}()
	_, err := Run(ctx, slog.New(slog.DiscardHandler), deployments.Command{Run: "echo $$ > " + file + "; exec sleep 1000"}, Env{}, nil)
	if !errors.Is(err, superseded) {
		t.Errorf("got %v", err)
	}
	awaitGone(t, pidIn(t, file))
	_, err = Run(ctx, slog.New(slog.DiscardHandler), deployments.Command{Run: "rm " + file}, Env{}, nil)
	if !errors.Is(err, superseded) || !strings.Contains(err.Error(), "was not run") {
		t.Errorf("after the end: %v", err)
	}
	if _, err := os.Stat(file); err != nil {
		t.Error("a command ran after the end")
	}
}

func TestDaemonThatHoldsPipesLivesOn(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	pidFile, stop, alive := filepath.Join(dir, "pid"), filepath.Join(dir, "stop"), filepath.Join(dir, "alive")
	// It goes on writing to the pipe that it inherited: that mustn't kill it either. And it holds a stdin that it
	// doesn't read.
	script := fmt.Sprintf(`exec 3<&0; (while [ -d %s -a ! -e %s ]; do echo still here; touch %s; sleep 0.05; done) & echo $! > %s; echo started`, dir, stop, alive, pidFile)
	begin := time.Now()
	r, err := run(t, deployments.Command{Run: script}, Env{}, make([]byte, 1<<20))
	if err != nil || !strings.Contains(string(r.Output), "started") {
		t.Errorf("got %q, %v", r.Output, err)
	}
	if took := time.Since(begin); took > 20*time.Second {
		t.Errorf("the daemon held the agent for %s", took)
	}
	os.Remove(alive)
	for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(alive); err == nil {
			break
		}
		if time.Since(begin) > 10*time.Second {
			t.Fatal("the daemon is dead")
		}
	}
	if err := os.WriteFile(stop, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	awaitGone(t, pidIn(t, pidFile))
}

func TestGigabyteOfOutput(t *testing.T) {
	t.Parallel()
	var logged counter
	var peak uint64
	var mu sync.Mutex
	log := slog.New(slog.NewTextHandler(&logged, nil))
	done := make(chan struct{})
	go func() {
		defer close(done)
		var m runtime.MemStats
		for range 20 {
			runtime.ReadMemStats(&m)
			mu.Lock()
			peak = max(peak, m.HeapInuse)
			mu.Unlock()
			time.Sleep(20 * time.Millisecond)
		}
	}()
	r, err := Run(t.Context(), log, deployments.Command{Run: `echo first; head -c 1073741824 /dev/zero; echo; yes | head -n 100000; echo last`}, Env{}, nil)
	<-done
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Output) > MaxOutput || !bytes.HasPrefix(r.Output, []byte("first\n")) || !bytes.HasSuffix(r.Output, []byte("\ny\nlast\n")) ||
		!bytes.Contains(r.Output, []byte("bytes left out]")) {
		t.Errorf("%d bytes: %.20q … %q", len(r.Output), r.Output, r.Output[len(r.Output)-20:])
	}
	if logged.n > 2*MaxLines*200+8*MaxLine {
		t.Errorf("%d bytes were logged", logged.n)
	}
	if peak > 100<<20 {
		t.Errorf("the heap grew to %d MB", peak>>20)
	}
}

type counter struct{ n int }

func (c *counter) Write(p []byte) (int, error) { c.n += len(p); return len(p), nil }

func TestLinesAreLogged(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	log := slog.New(slog.NewTextHandler(&b, nil))
	if _, err := Run(t.Context(), log, deployments.Command{Run: `printf 'one\r\ntwo\377\nno newline'; head -c 3000 /dev/zero | tr '\0' x`}, Env{}, nil); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"line=one\n", "line=\"two\ufffd\"\n", `line="no newlinexxx`, "more bytes]"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("the log lacks %q:\n%s", want, b.String())
		}
	}
}

func TestOutputKeepsBothEnds(t *testing.T) {
	t.Parallel()
	for _, steps := range [][]int{{1}, {7}, {4096}, {keepTail}, {keepTail + 1}, {200_000}, {60_000, keepTail, 5}, {80_001, 30_000, 50_000}} {
		o := &output{log: slog.New(slog.DiscardHandler)}
		all := make([]byte, 300_000)
		for i := range all {
			all[i] = byte(i / 251)
		}
		for i, rest := 0, all; len(rest) > 0; i++ {
			n, _ := o.Write(rest[:min(steps[i%len(steps)], len(rest))])
			rest = rest[n:]
		}
		got := o.bytes()
		if len(got) > MaxOutput || !bytes.HasPrefix(got, all[:keepHead]) || !bytes.HasSuffix(got, all[len(all)-keepTail:]) {
			t.Errorf("written %d bytes at a time: the ends are wrong", steps)
		}
	}
}

func TestEndLeftovers(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	obedient, stubborn, other := filepath.Join(dir, "a"), filepath.Join(dir, "b"), filepath.Join(dir, "c")
	mark := fmt.Sprintf("leftovers-%d", os.Getpid())
	script := fmt.Sprintf(`setsid sh -c 'echo $$ > %s; exec sleep 1000' >/dev/null 2>&1 &
		(trap "" TERM; sleep 1000) >/dev/null 2>&1 & echo $! > %s`, obedient, stubborn)
	if _, err := run(t, deployments.Command{Run: script}, Env{Run: mark}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := run(t, deployments.Command{Run: "sleep 1000 >/dev/null 2>&1 & echo $! > " + other}, Env{Run: mark + "0"}, nil); err != nil {
		t.Fatal(err)
	}
	a, b, c := pidIn(t, obedient), pidIn(t, stubborn), pidIn(t, other)
	t.Cleanup(func() { syscall.Kill(c, syscall.SIGKILL) })
	if n, err := EndLeftovers(t.Context(), mark); err != nil || n < 2 {
		t.Errorf("ended %d, %v", n, err)
	}
	awaitGone(t, a)
	awaitGone(t, b)
	if syscall.Kill(c, 0) != nil {
		t.Error("another command's process was ended")
	}
	if n, err := EndLeftovers(t.Context(), mark); err != nil || n != 0 {
		t.Errorf("then %d more, %v", n, err)
	}
}

// What ignores SIGTERM may start others all the while: none is left, not even dying, when the command is run again.
func TestEndLeftoversLeavesNone(t *testing.T) {
	t.Parallel()
	mark := fmt.Sprintf("restless-%d", os.Getpid())
	ready := filepath.Join(t.TempDir(), "ready")
	script := fmt.Sprintf(`for i in 1 2 3 4; do (trap "" TERM; while :; do (echo $$ > %s; exec sleep 0.02); done) >/dev/null 2>&1 & done`, ready)
	if _, err := run(t, deployments.Command{Run: script}, Env{Run: mark}, nil); err != nil {
		t.Fatal(err)
	}
	pidIn(t, ready)
	if n, err := EndLeftovers(t.Context(), mark); err != nil || n == 0 {
		t.Errorf("ended %d, %v", n, err)
	}
	if pids, err := markedProcesses(mark); err != nil || len(pids) > 0 {
		t.Errorf("left: %d, %v", pids, err)
		for len(pids) > 0 {
			for _, pid := range pids {
				syscall.Kill(pid, syscall.SIGKILL)
			}
			pids, _ = markedProcesses(mark)
		}
	}
}

// Called off while it still waits for an orderly end, it says so: the command must not be taken for ended.
func TestEndLeftoversCalledOff(t *testing.T) {
	t.Parallel()
	mark := fmt.Sprintf("called-off-%d", os.Getpid())
	dir := t.TempDir()
	file, deaf, asked := filepath.Join(dir, "pid"), filepath.Join(dir, "deaf"), filepath.Join(dir, "asked")
	script := fmt.Sprintf(`(trap "echo 1 > %s" TERM; touch %s; while :; do sleep 0.05; done) >/dev/null 2>&1 & echo $! > %s
		while [ ! -e %[2]s ]; do sleep 0.01; done`, asked, deaf, file)
	if _, err := run(t, deployments.Command{Run: script}, Env{Run: mark}, nil); err != nil {
		t.Fatal(err)
	}
	pid := pidIn(t, file)
	t.Cleanup(func() { syscall.Kill(pid, syscall.SIGKILL) })
	superseded := errors.New("superseded")
	ctx, cancel := context.WithCancelCause(t.Context())
	go func() {
		for ctx.Err() == nil {
			if _, err := os.Stat(asked); err == nil {
				cancel(superseded)
			}
			time.Sleep(5 * time.Millisecond)
		}
	}()
	if _, err := EndLeftovers(ctx, mark); !errors.Is(err, superseded) {
		t.Errorf("got %v", err)
	}
	cancel(nil)
	if syscall.Kill(pid, 0) != nil {
		t.Error("it was killed within its time")
	}
}

// An error names its command, which may be a whole script.
func TestErrorsAreShort(t *testing.T) {
	t.Parallel()
	for _, script := range []string{"\nfirst\nexit 3\n# " + strings.Repeat("x", 1000), "first; exit 3; #" + strings.Repeat("ü", 1000)} {
		_, err := run(t, deployments.Command{Run: script}, Env{}, nil)
		if err == nil || len(err.Error()) > 600 || strings.Contains(err.Error(), "\\n") ||
			!strings.Contains(err.Error(), `command "first`) || !strings.Contains(err.Error(), "...") {
			t.Errorf("%q", err)
		}
	}
}

// A program of the system's gets no secrets either, and speaks a language that can be read. It sets the
// environment, so it isn't parallel.
func TestTool(t *testing.T) {
	t.Setenv("CONSUL_HTTP_TOKEN", "secret")
	t.Setenv("LC_ALL", "de_DE.UTF-8")
	r, err := Tool(t.Context(), slog.New(slog.DiscardHandler), nil, "env")
	if err != nil || strings.Contains(string(r.Output), "CONSUL_HTTP_TOKEN") || !strings.Contains("\n"+string(r.Output), "\nLC_ALL=C\n") {
		t.Errorf("got %v\n%s", err, r.Output)
	}
	r, err = Tool(t.Context(), slog.New(slog.DiscardHandler), nil, "ls", "/no such")
	if err == nil || r.Exit != 2 || !strings.Contains(err.Error(), `command "ls /no such"`) {
		t.Errorf("got exit %d, %v", r.Exit, err)
	}
	var all bytes.Buffer
	r, err = Tool(t.Context(), slog.New(slog.DiscardHandler), &all, "seq", "20000")
	if err != nil || strings.Count(all.String(), "\n") != 20_000 || len(r.Output) > MaxOutput {
		t.Errorf("got %d bytes of all output, and %d bytes kept, %v", all.Len(), len(r.Output), err)
	}
}

// A manifest asks for no secret of the agent's, and commands of its own user have those that are meant for them. It
// sets the environment, so it isn't parallel.
func TestWhatTheAgentKeeps(t *testing.T) {
	for _, name := range []string{"CONSUL_HTTP_TOKEN", "KEDGE_WEBHOOK_SECRET", "AWS_SECRET_ACCESS_KEY"} {
		t.Setenv(name, "secret")
	}
	for name, want := range map[string]bool{"CONSUL_HTTP_TOKEN": false, "KEDGE_WEBHOOK_SECRET": false, "NOTIFY_SOCKET": false, "PATH": true} {
		if value, ok := LookupEnv(name); ok != want || !ok && value != "" {
			t.Errorf("a manifest finds %s: %v, %q", name, ok, value)
		}
	}
	self, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"", self.Username, self.Uid} {
		c := deployments.Command{Run: `echo "$CONSUL_HTTP_TOKEN,$KEDGE_WEBHOOK_SECRET,$AWS_SECRET_ACCESS_KEY"`, User: name}
		if r, err := run(t, c, Env{}, nil); err != nil || string(r.Output) != ",,secret\n" {
			t.Errorf("user %q finds %q, %v", name, r.Output, err)
		}
	}
}

// An agent without a PATH gives its commands one, and finds the shell. It sets the environment, so it isn't parallel.
func TestWithoutPath(t *testing.T) {
	t.Setenv("PATH", "")
	os.Unsetenv("PATH") // and Setenv's cleanup sets it again
	if r, err := run(t, deployments.Command{Run: "cat /dev/null && echo $PATH"}, Env{}, nil); err != nil || string(r.Output) != defaultPath+"\n" {
		t.Errorf("got %q, %v", r.Output, err)
	}
}

func TestCheckLeavesNothingRunning(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "pid")
	session := "setsid sh -c 'echo $$ > " + file + ".new; mv " + file + ".new " + file + "; exec sleep 1000' >/dev/null 2>&1 & " +
		"until [ -e " + file + " ]; do sleep 0.01; done"
	for _, c := range []struct {
		run   string
		fails bool
	}{
		{"sleep 1000 & echo $! > " + file, false},
		{"sleep 1000 & echo $! > " + file + "; exit 1", true},
		{session, false},
		{session + "; exec sleep 1000", true}, // until its timeout
	} {
		err := errors.Join(os.RemoveAll(file), Check(t.Context(), deployments.Command{Run: c.run, Timeout: 2 * time.Second}, Env{}))
		if (err != nil) != c.fails {
			t.Error(err)
		}
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
		if err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)) // a zombie waits for init
			if err != nil || strings.Contains(string(stat), ") Z ") {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("what a check began goes on")
			}
		}
	}
}

// Of a long output the beginning is logged, and the end, where the error is.
func TestLongOutputIsLoggedToItsEnd(t *testing.T) {
	t.Parallel()
	for _, lines := range []int{1, 400, 401, 500, 501, 777, 5000} {
		var b bytes.Buffer
		log := slog.New(slog.NewTextHandler(&b, nil))
		if _, err := Run(t.Context(), log, deployments.Command{Run: fmt.Sprintf("seq %d", lines)}, Env{}, nil); err != nil {
			t.Fatal(err)
		}
		var got []string
		for line := range strings.Lines(b.String()) {
			if _, text, ok := strings.Cut(strings.TrimSpace(line), LineKey+"="); ok {
				got = append(got, text)
			}
		}
		var want []string
		for i := range lines {
			if n := i + 1; n <= 400 || n > lines-100 {
				want = append(want, strconv.Itoa(n))
			} else if lines > 500 && n == 401 {
				want = append(want, fmt.Sprintf("%q", fmt.Sprintf("[%d lines left out]", lines-500)))
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("of %d lines: %d logged, want %d: …%q", lines, len(got), len(want), got[max(0, len(got)-3):])
		}
	}
}
