package transport

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp"
	"github.com/go-git/go-git/v5/plumbing/transport"
	gitssh "github.com/go-git/go-git/v5/plumbing/transport/ssh"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
	"golang.org/x/net/proxy"

	"kedge/deployments/inputfile"
	"kedge/deployments/safetext"
)

// sessionTimeout bounds how long a connection that was kept open may take to begin a session: the server may have
// gone silently.
const sessionTimeout = 10 * time.Second

// sshServer is a Git host behind ssh. Its connection stays open between polls.
type sshServer struct {
	endpoint transport.Endpoint
	access   Access

	mu      sync.Mutex
	conn    *ssh.Client
	keyData string // the contents of the key and known_hosts files when conn was opened
	v0      bool   // conn's server refuses GIT_PROTOCOL
}

// sshSession is one run of git-upload-pack. Reads and writes end when the session or its context does.
type sshSession struct {
	*ssh.Session
	in     io.WriteCloser
	out    *bufio.Reader
	errors boundedBuffer
	// unwatch, once called, keeps the end of the session's context from closing the connection.
	unwatch func() bool
	hello   *greeting // nil: the server speaks protocol v0
}

func (s *sshServer) Heads(ctx context.Context, prefix string) (map[string]string, error) {
	session, err := s.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer session.end()
	if session.hello != nil {
		if err := session.send(lsRefs(prefix)); err != nil {
			return nil, s.explain(session, err)
		}
		refs, err := readRefs(session.out, prefix)
		return refs, s.explain(session, err)
	}
	refs, err := session.advertised()
	if err != nil {
		return nil, s.explain(session, err)
	}
	_ = session.send("0000") // requests nothing; the server may be gone
	return headsOf(refs, prefix), nil
}

// send writes the whole request, and closes the session's input.
func (s *sshSession) send(request string) error {
	_, err := io.WriteString(s.in, request)
	_ = s.in.Close() // the server may have answered and ended
	return err
}

func (s *sshServer) Fetch(ctx context.Context, q Query) (io.ReadCloser, plumbing.Hash, error) {
	session, err := s.begin(ctx)
	if err != nil {
		return nil, q.Want, err
	}
	pack, want, err := session.fetch(q)
	if err != nil {
		defer session.end()
		return nil, want, s.explain(session, err)
	}
	return &sshPack{pack, session}, want, nil
}

func (s *sshSession) fetch(q Query) (io.Reader, plumbing.Hash, error) {
	if s.hello != nil {
		if err := s.send(s.hello.fetch(q)); err != nil {
			return nil, q.Want, err
		}
		pack, err := packSection(s.out)
		return pack, q.Want, err
	}
	refs, err := s.advertised()
	if err != nil {
		return nil, q.Want, err
	}
	req, err := requestV0(refs, q)
	if err != nil {
		return nil, q.Want, err
	}
	want := req.Wants[0]
	var ask pkts
	err = errors.Join(req.UploadRequest.Encode(&ask), req.UploadHaves.Encode(&ask, true))
	if err != nil {
		return nil, want, err
	}
	ask.line("done")
	if err := s.send(ask.String()); err != nil {
		return nil, want, err
	}
	resp := packp.NewUploadPackResponse(req)
	if err := resp.Decode(io.NopCloser(s.out)); err != nil {
		return nil, want, err
	}
	return demultiplexed(req, resp), want, nil
}

// advertised reads the list of all references, with which a server of protocol v0 begins.
func (s *sshSession) advertised() (*packp.AdvRefs, error) {
	var first []byte // the first packet only: peeking further could block, as the server waits after the last packet
	if length, err := s.out.Peek(4); err == nil {
		if n, err := strconv.ParseUint(string(length), 16, 16); err == nil {
			first, _ = s.out.Peek(min(int(n), s.out.Size()))
		}
	}
	refs, err := advertisedRefs(first, s.out)
	if err != nil {
		return nil, err
	}
	transport.FilterUnsupportedCapabilities(refs.Capabilities) // such as thin packs
	return refs, nil
}

// sshPack reads the pack that a session receives. Close ends the session.
type sshPack struct {
	io.Reader
	session *sshSession
}

func (p *sshPack) Close() error {
	p.session.end()
	return nil
}

// begin starts git-upload-pack, and reads the server's greeting. If that fails on a connection that was kept open, but
// not by a Refusal, begin retries once on a new one. If a key or known_hosts file changed, it opens a new one at once.
func (s *sshServer) begin(ctx context.Context) (*sshSession, error) {
	config, keyData, err := s.config()
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn != nil && s.keyData == keyData {
		short, cancel := context.WithTimeout(ctx, sessionTimeout)
		session, err := s.start(short, ctx)
		cancel()
		if err == nil || errors.As(err, new(*Refusal)) || ctx.Err() != nil {
			return session, err
		}
	}
	s.drop()
	if err := s.dial(ctx, config); err != nil {
		return nil, err
	}
	s.keyData = keyData
	session, err := s.start(ctx, ctx)
	if err != nil && !errors.As(err, new(*Refusal)) {
		s.drop()
	}
	return session, err
}

// start begins a session, and fails if the context starting ends first. Once begun, the session lives until the context
// running ends.
func (s *sshServer) start(starting, running context.Context) (*sshSession, error) {
	conn := s.conn
	hang := context.AfterFunc(starting, func() { conn.Close() })
	defer hang()
	session := &sshSession{unwatch: func() bool { return true }}
	err := session.start(conn, &s.v0, "git-upload-pack "+quoted(s.endpoint.Path))
	if err != nil {
		defer session.end()
		if starting.Err() != nil {
			err = fmt.Errorf("the server does not answer: %w", starting.Err())
		}
		return nil, s.explain(session, err)
	}
	session.unwatch = context.AfterFunc(running, func() { conn.Close() })
	return session, nil
}

func (s *sshSession) start(conn *ssh.Client, v0 *bool, command string) (err error) {
	if s.Session, err = conn.NewSession(); err != nil {
		return err
	}
	if s.in, err = s.StdinPipe(); err != nil {
		return err
	}
	out, err := s.StdoutPipe()
	if err != nil {
		return err
	}
	s.out = bufio.NewReader(out)
	s.Stderr = &s.errors
	if !*v0 {
		// A server that refuses variables speaks v0, and its connection stays usable.
		if err := s.Setenv("GIT_PROTOCOL", "version=2"); err != nil {
			if *v0 = strings.Contains(err.Error(), "setenv failed"); !*v0 {
				return err
			}
		}
	}
	if err := s.Start(command); err != nil {
		return err
	}
	length, err := s.out.Peek(4)
	if err != nil {
		return noEOF(err)
	}
	n, err := strconv.ParseUint(string(length), 16, 16)
	switch {
	case err != nil:
		return fmt.Errorf("the server answers %q, which isn't Git's protocol", length)
	case n < 4+uint64(len(version2)) || n > 4+uint64(len(version2))+1:
		return nil
	}
	line, err := s.out.Peek(4 + len(version2))
	if err != nil || string(line[4:]) != version2 {
		return nil
	}
	if _, _, err := readPkt(s.out); err != nil {
		return err
	}
	hello, err := readGreeting(s.out)
	s.hello = &hello
	return err
}

// end ends the session; its connection stays open.
func (s *sshSession) end() {
	s.unwatch()
	if s.Session != nil {
		s.Close()
	}
}

// config returns the configuration of the connection, and the contents of the files that it was read from, to notice
// changes.
func (s *sshServer) config() (*ssh.ClientConfig, string, error) {
	auth, read, err := s.access.sshAuth(&s.endpoint)
	if err != nil {
		return nil, "", err
	}
	var held strings.Builder
	for _, name := range read {
		data, err := inputfile.Read("ssh", name)
		if err != nil {
			return nil, "", err
		}
		fmt.Fprintf(&held, "%d:%s", len(data), data)
	}
	config, err := auth.ClientConfig()
	return config, held.String(), err
}

// sshAddress returns the address of a URL's host and port. get looks up ~/.ssh/config and the system's. If they have a
// Hostname for the host, sshAddress takes that, and their Port unless the URL has a port other than 22. A URL with port
// 22 counts as one without a port, as go-git doesn't tell them apart.
func sshAddress(host string, port int, get func(host, key string) string) string {
	if name := get(host, "Hostname"); name != "" {
		if n, err := strconv.Atoi(get(host, "Port")); err == nil && (port == 0 || port == gitssh.DefaultPort) {
			port = n
		}
		host = name
	}
	if port == 0 {
		port = gitssh.DefaultPort
	}
	return net.JoinHostPort(host, strconv.Itoa(port))
}

// dial opens the connection to sshAddress, through the proxy in ALL_PROXY if there is one. Without
// a key file it connects to the SSH agent until the server has accepted a key.
func (s *sshServer) dial(ctx context.Context, config *ssh.ClientConfig) error {
	if s.access.SSHKey == "" {
		keys, err := dialAgent(ctx)
		if err != nil {
			return err
		}
		defer keys.Close()
		defer context.AfterFunc(ctx, func() { keys.Close() })()
		config.Auth = []ssh.AuthMethod{ssh.PublicKeysCallback(agent.NewClient(keys).Signers)}
	}
	address := sshAddress(s.endpoint.Host, s.endpoint.Port, gitssh.DefaultSSHConfig.Get)
	raw, err := proxy.Dial(ctx, "tcp", address)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { raw.Close() })
	defer stop()
	conn, channels, requests, err := ssh.NewClientConn(raw, address, config)
	if err != nil {
		raw.Close()
		if ctx.Err() != nil {
			err = fmt.Errorf("the server does not answer: %w", ctx.Err())
		}
		return err
	}
	s.conn, s.v0 = ssh.NewClient(conn, channels, requests), false
	return nil
}

// drop closes the connection.
func (s *sshServer) drop() {
	if s.conn != nil {
		s.conn.Close()
		s.conn = nil
	}
}

func (s *sshServer) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drop()
}

// explain returns a Refusal with the server's error text if the session ended early and there is
// such a text. Otherwise it returns err.
func (s *sshServer) explain(session *sshSession, err error) error {
	if err == nil || !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) &&
		!errors.Is(err, packp.ErrEmptyInput) || session.Session == nil {
		return err
	}
	_ = session.Wait() // the output has ended, but the server's errors may not have come yet
	if words := session.errors.String(); words != "" {
		return &Refusal{Host: s.endpoint.Host, Words: words}
	}
	return err
}

// boundedBuffer keeps the first maxAnswer bytes that are written to it.
type boundedBuffer struct {
	mu   sync.Mutex
	data bytes.Buffer
}

func (b *boundedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.data.Write(p[:min(len(p), maxAnswer-b.data.Len())])
	return len(p), nil
}

// String returns the buffer's text on one line, cut to maxWords bytes.
func (b *boundedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return safetext.Line(strings.Join(strings.Fields(b.data.String()), " "), maxWords)
}

// quoted quotes a path for the server's shell, as git(1) does.
func quoted(path string) string {
	return "'" + strings.NewReplacer("'", `'\''`, "!", `'\!'`).Replace(path) + "'"
}
