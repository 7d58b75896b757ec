// Package objecttest starts a real S3 server for tests, and a proxy before it that injects faults.
package objecttest

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"kedge/artifact/object"
	"kedge/deployments/tooltest"
)

const (
	accessKey, secretKey = "kedge-test", "kedge-test-secret"
	region               = "us-east-1"
	bucket               = "kedge"
	startTimeout         = 30 * time.Second
)

// Server is an S3 server over the test's own directory: versitygw, as .ci/tools builds it. It ends with the test.
type Server struct {
	tb      testing.TB
	dir     string
	address string
	args    []string
	mu      sync.Mutex
	process *exec.Cmd
	done    chan struct{}
	log     bytes.Buffer
}

// Start starts a server with one empty bucket, and with further arguments for versitygw. It fails the test if the
// program is missing.
func Start(tb testing.TB, args ...string) *Server {
	tb.Helper()
	s := &Server{tb: tb, dir: tb.TempDir(), args: args}
	if err := os.MkdirAll(filepath.Join(s.dir, bucket), 0o755); err != nil {
		tb.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	s.address = listener.Addr().String()
	listener.Close()
	s.Restart()
	tb.Cleanup(s.Stop)
	return s
}

// Restart restarts a stopped server, at the same address and with the same data.
func (s *Server) Restart() {
	s.tb.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	args := slices.Concat(
		[]string{
			"--port",
			s.address,
			"--access",
			accessKey,
			"--secret",
			secretKey,
			"--region",
			region,
			"--keep-alive",
			"--quiet",
		},
		s.args,
		[]string{"posix", s.dir},
	)
	s.process = exec.Command(tooltest.Path(s.tb, "versitygw"), args...)
	s.process.Stdout, s.process.Stderr = &s.log, &s.log
	s.process.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	s.done = make(chan struct{})
	started := make(chan error)
	go func(p *exec.Cmd, done chan struct{}) {
		// The death signal is sent when the thread that forked ends, and another goroutine's thread may end: so
		// this one lives as long as the child.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.Start()
		started <- err
		if err == nil {
			p.Wait()
		}
		close(done)
	}(s.process, s.done)
	if err := <-started; err != nil {
		s.tb.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	for {
		connection, err := (&net.Dialer{}).DialContext(ctx, "tcp", s.address)
		if err == nil {
			connection.Close()
			return
		}
		select {
		case <-s.done:
			s.tb.Fatalf("the S3 server ended: %s", s.log.String())
		case <-ctx.Done():
			s.tb.Fatalf("the S3 server did not start: %v", err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// Stop ends the server, as an outage would.
func (s *Server) Stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.process.Process.Kill()
	<-s.done
}

// Endpoint returns the server's URL.
func (s *Server) Endpoint() string { return "http://" + s.address }

// Dir returns the directory of the server's objects.
func (s *Server) Dir() string { return filepath.Join(s.dir, bucket) }

// URL returns the URL of an object, or of a prefix, in the bucket.
func (s *Server) URL(path string) string { return "s3://" + bucket + "/" + path }

// Client returns a client for this server, whatever the environment says.
func (s *Server) Client() *object.Client { return s.ClientAt(s.Endpoint()) }

// ClientAt is Client with another endpoint, such as a proxy's.
func (s *Server) ClientAt(endpoint string) *object.Client {
	return object.New(s.config(endpoint))
}

func (s *Server) config(endpoint string) object.Config {
	return object.Config{
		S3: &object.S3Config{Endpoint: endpoint, Region: region, AccessKey: accessKey, SecretKey: secretKey},
	}
}

// Env returns the environment in which a process uses this server.
func (s *Server) Env() []string {
	return []string{
		"AWS_ENDPOINT_URL_S3=" + s.Endpoint(), "AWS_REGION=" + region, "AWS_EC2_METADATA_DISABLED=true",
		"AWS_ACCESS_KEY_ID=" + accessKey, fmt.Sprintf("AWS_SECRET_ACCESS_KEY=%s", secretKey),
	}
}
