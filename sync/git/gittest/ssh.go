package gittest

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"

	"kedge/kv/kvtest"
)

// SSHOrigin is a repository behind a real sshd on its own port.
type SSHOrigin struct {
	*Origin
	URL, Host  string
	Key, Known string // files
	HostKey    ssh.PublicKey
	Conns      atomic.Int64 // connections that were opened
	Sent       atomic.Int64 // bytes that the server sent
	sshd       *exec.Cmd
	cut        chan struct{} // closed to end the present connections
	mu         sync.Mutex
}

// Cut ends all present connections.
func (s *SSHOrigin) Cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.cut)
	s.cut = make(chan struct{})
}

// front passes connections on to sshd, and counts them and the bytes that sshd sends.
func (s *SSHOrigin) front(l net.Listener, sshd string) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		s.Conns.Add(1)
		s.mu.Lock()
		cut := s.cut
		s.mu.Unlock()
		go func() {
			defer c.Close()
			to, err := net.Dial("tcp", sshd)
			if err != nil {
				return
			}
			defer to.Close()
			done := make(chan struct{}, 2)
			go func() { _, _ = io.Copy(to, c); done <- struct{}{} }()
			go func() { _, _ = io.Copy(&counted{c, &s.Sent}, to); done <- struct{}{} }()
			select {
			case <-done:
			case <-cut:
			}
		}()
	}
}

// counted counts the bytes that are written.
type counted struct {
	io.Writer
	n *atomic.Int64
}

func (c *counted) Write(p []byte) (int, error) {
	n, err := c.Writer.Write(p)
	c.n.Add(int64(n))
	return n, err
}

// ServeSSH serves o by sshd until the test ends. more are further lines of sshd's configuration. By default sshd only
// speaks protocol v0; Git hosts set AcceptEnv GIT_PROTOCOL. Without sshd a short test is skipped, any other fails.
func ServeSSH(t testing.TB, o *Origin, more ...string) *SSHOrigin {
	t.Helper()
	path, err := exec.LookPath("sshd")
	if err != nil {
		path = "/usr/sbin/sshd"
	}
	if _, err := os.Stat(path); err != nil {
		if testing.Short() {
			t.Skip("sshd is not installed")
		}
		t.Fatalf("these tests need sshd (%v): .ci/tools installs it", err)
	}
	dir := t.TempDir()
	s := &SSHOrigin{
		Origin: o,
		cut:    make(chan struct{}),
		Key:    filepath.Join(dir, "id"),
		Known:  filepath.Join(dir, "known_hosts"),
	}
	s.HostKey = NewKey(t, filepath.Join(dir, "host"), "")
	userKey := NewKey(t, s.Key, "")
	WriteFile(t, filepath.Join(dir, "authorized_keys"), string(ssh.MarshalAuthorizedKey(userKey)))
	_, port, _ := net.SplitHostPort(kvtest.FreeAddr(t, "127.0.0.1"))
	if os.Getuid() == 0 { // sshd needs the directory, which its package only makes with the service
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
			t.Fatal(err)
		}
	}
	WriteFile(t, filepath.Join(dir, "sshd_config"), fmt.Sprintf(`ListenAddress 127.0.0.1:%s
HostKey %[2]s/host
AuthorizedKeysFile %[2]s/authorized_keys
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
SetEnv GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0=*
`, port, dir)+strings.Join(more, "\n")+"\n")
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	s.sshd = exec.Command(path, "-D", "-e", "-f", filepath.Join(dir, "sshd_config"))
	s.sshd.Stderr = log
	if err := s.sshd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.sshd.Process.Kill()
		s.sshd.Wait()
		if t.Failed() {
			text, _ := os.ReadFile(log.Name())
			t.Logf("sshd: %s", text)
		}
	})
	sshd := "127.0.0.1:" + port
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		c, err := net.Dial("tcp", sshd)
		if err == nil {
			c.Close()
			break
		}
		if time.Now().After(end) {
			t.Fatalf("sshd: %v", err)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	s.Host = l.Addr().String()
	go s.front(l, sshd)
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	s.URL = "ssh://" + me.Username + "@" + s.Host + o.Bare
	s.Know(t, s.HostKey)
	return s
}

// Know sets the server's key in known_hosts to key.
func (s *SSHOrigin) Know(t testing.TB, key ssh.PublicKey) {
	WriteFile(t, s.Known, knownhosts.Line([]string{knownhosts.Normalize(s.Host)}, key)+"\n")
}

// NewKey writes a private key to file, encrypted unless passphrase is empty, and returns the public key.
func NewKey(t testing.TB, file, passphrase string) ssh.PublicKey {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(private, "")
	if passphrase != "" {
		block, err = ssh.MarshalPrivateKeyWithPassphrase(private, "", []byte(passphrase))
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	return key
}
