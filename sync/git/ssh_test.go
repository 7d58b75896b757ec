package git

import (
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"kedge/sync/git/gittest"
)

// acceptsV2 is the line of sshd_config with which Git hosts speak protocol v2.
const acceptsV2 = "AcceptEnv GIT_PROTOCOL"

// openSSH opens branch main of s.
func openSSH(t *testing.T, s *gittest.SSHOrigin) Branch {
	t.Helper()
	return openBranch(t, Config{Repo: s.URL, Branch: "main", SSHKey: s.Key, KnownHosts: s.Known})
}

// Polls by ssh use one connection, and request only the one branch if the server supports it.
func TestSSHPollsAreCheap(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	v2, v0 := gittest.ServeSSH(t, o, acceptsV2), gittest.ServeSSH(t, o)
	head := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	const others = 20_000
	o.Refer(others, head)
	for _, c := range []struct {
		what        string
		server      *gittest.SSHOrigin
		least, most int64
	}{{"v2", v2, 0, 4 << 10}, {"v0", v0, others * 50, others * 100}} {
		b := openSSH(t, c.server)
		reads(t, b, head)
		sent := c.server.Sent.Load()
		const polls = 5
		for range polls {
			reads(t, b, head)
		}
		if n := (c.server.Sent.Load() - sent) / polls; n < c.least || n > c.most {
			t.Errorf("%s: a poll takes %d bytes", c.what, n)
		}
		if n := c.server.Conns.Load(); n != 1 {
			t.Errorf("%s: %d connections", c.what, n)
		}
	}
	// A fetch doesn't request all references either.
	b := openSSH(t, v2)
	reads(t, b, head)
	sent := v2.Sent.Load()
	reads(t, b, o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")}))
	if n := v2.Sent.Load() - sent; n > 16<<10 {
		t.Errorf("a push takes %d bytes", n)
	}
}

// An SSH agent is dialled once for each connection to the server, and its own connection is closed.
func TestSSHAgentIsDialledOnce(t *testing.T) {
	s := gittest.ServeSSH(t, gittest.New(t), acceptsV2)
	head := s.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	key, err := ssh.ParseRawPrivateKey([]byte(readFile(t, s.Key)))
	if err != nil {
		t.Fatal(err)
	}
	keys := agent.NewKeyring()
	if err := keys.Add(agent.AddedKey{PrivateKey: key}); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "agent")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var dialled, open atomic.Int64
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			dialled.Add(1)
			open.Add(1)
			go func() {
				defer c.Close()
				_ = agent.ServeAgent(keys, c)
				open.Add(-1)
			}()
		}
	}()
	t.Setenv("SSH_AUTH_SOCK", socket)
	b := openBranch(t, Config{Repo: s.URL, Branch: "main", KnownHosts: s.Known})
	for range 3 {
		reads(t, b, head)
	}
	for end := time.Now().Add(10 * time.Second); open.Load() != 0 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	if dialled.Load() != 1 || open.Load() != 0 {
		t.Errorf("%d connections to the agent, %d of them still open; want one, closed", dialled.Load(), open.Load())
	}
	s.Cut()
	reads(t, b, head)
	if dialled.Load() != 2 {
		t.Errorf("%d connections to the agent after a second one to the server", dialled.Load())
	}
	t.Setenv("SSH_AUTH_SOCK", "")
	s.Cut()
	fails(t, b, "no agent", "no SSH agent answers: name a key file with --ssh-key (SSH_AUTH_SOCK is not set)")
}

// A connection that ended is opened again, and a change of its key or known_hosts file ends it.
func TestSSHConnections(t *testing.T) {
	t.Parallel()
	s := gittest.ServeSSH(t, gittest.New(t), acceptsV2)
	head := s.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	b := openSSH(t, s)
	reads(t, b, head)
	s.Cut()
	reads(t, b, head)
	reads(t, b, s.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")}))
	if n := s.Conns.Load(); n != 2 {
		t.Errorf("%d connections, want one, and one after it was cut", n)
	}
	known := readFile(t, s.Known)
	gittest.WriteFile(t, s.Known, "")
	fails(t, b, "known_hosts that name it no more", "is not in")
	gittest.WriteFile(t, s.Known, known)
	key := readFile(t, s.Key)
	gittest.NewKey(t, s.Key, "")
	fails(t, b, "a key that was replaced by another", "accepts no key of "+s.Key)
	gittest.WriteFile(t, s.Key, key)
	reads(t, b, s.Push(map[string]string{"prod/web/app.yaml": unitFile("app/3")}))
}

// If the server ends instead of answering, the error has the server's own words.
func TestSSHServersOwnWords(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	for what, more := range map[string]string{"v2": acceptsV2, "v0": ""} {
		s := gittest.ServeSSH(t, o, more)
		s.URL += "-that-isn't-there!"
		b := openSSH(t, s)
		for range 2 {
			fails(t, b, what, "that-isn't-there!' does not appear to be a git repository", "may this key read it")
		}
		if n := s.Conns.Load(); n != 1 {
			t.Errorf("%s: %d connections", what, n)
		}
		b = openBranch(t, Config{Repo: strings.TrimSuffix(s.URL, "-that-isn't-there!"), Branch: "trunk",
			SSHKey: s.Key, KnownHosts: s.Known})
		fails(t, b, what, "no such branch", "main")
	}
	// Hosts that give people a shell print a greeting, and end.
	s := gittest.ServeSSH(t, o, "ForceCommand echo 'this account is for people' >&2; exit 1")
	fails(t, openSSH(t, s), "a forced command", "this account is for people")
	s = gittest.ServeSSH(t, o, "ForceCommand echo Welcome")
	fails(t, openSSH(t, s), "a greeting", "Welc")
	// A repository that has no commit yet.
	empty := gittest.New(t)
	for what, more := range map[string]string{"v2": acceptsV2, "v0": ""} {
		fails(t, openSSH(t, gittest.ServeSSH(t, empty, more)), what, "no such branch")
	}
}
