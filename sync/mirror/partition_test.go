package mirror

import (
	"maps"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/deployments/logtest"
	"kedge/kv/kvtest"
	"kedge/sync/git/gittest"
)

// link forwards TCP connections to one address until it is cut: then nothing passes in either direction, as if
// packets were dropped, and neither side is notified.
type link struct {
	addr string

	mu  sync.Mutex
	cut chan struct{} // nil: it carries
}

func newLink(t *testing.T, to string) *link {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &link{addr: listener.Addr().String()}
	var carrying sync.WaitGroup
	var mu sync.Mutex
	var open []net.Conn
	keep := func(c net.Conn) {
		mu.Lock()
		open = append(open, c)
		mu.Unlock()
	}
	carrying.Go(func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			keep(near)
			far, err := net.Dial("tcp", to)
			if err != nil {
				near.Close()
				continue
			}
			keep(far)
			carrying.Go(func() { l.carry(near, far) })
			carrying.Go(func() { l.carry(far, near) })
		}
	})
	t.Cleanup(func() {
		l.mend()
		listener.Close()
		mu.Lock()
		for _, c := range open {
			c.Close()
		}
		mu.Unlock()
		carrying.Wait()
	})
	return l
}

func (l *link) carry(to, from net.Conn) {
	defer to.Close()
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		l.mu.Lock()
		cut := l.cut
		l.mu.Unlock()
		if cut != nil {
			<-cut // what was under way then is lost
			return
		}
		if _, writeErr := to.Write(buf[:n]); err != nil || writeErr != nil {
			return
		}
	}
}

func (l *link) sever() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cut == nil {
		l.cut = make(chan struct{})
	}
}

func (l *link) mend() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cut != nil {
		close(l.cut)
		l.cut = nil
	}
}

// The leader is cut off from Consul, but runs, and sees Git. The other mirror takes over within seconds; the first
// knows by its own clock that it no longer leads, and when the link is restored it stands by, and can take over.
func TestPartitionedLeaderIsReplaced(t *testing.T) {
	t.Parallel()
	consul, o := kvtest.StartConsul(t, kvtest.ConsulOptions{}), gittest.New(t)
	o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	seen := &running{tb: t, store: consul.Open(consul.RootToken), log: &logtest.Buffer{}}
	l := newLink(t, consul.Addr())
	env := consul.Env(consul.RootToken)
	a := startProcess(t, "a", o.Bare, append(env, "CONSUL_HTTP_ADDR="+l.addr))
	seen.runs("prod/web/app", "app/1")
	b := startProcess(t, "b", o.Bare, env)

	l.sever()
	began := time.Now()
	head := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
	seen.status(func(s deployments.MirrorState) bool { return s.Holder == "b" && s.Head == head })
	t.Logf("the other mirror wrote %v after the leader was cut off", time.Since(began).Round(time.Millisecond))
	if !strings.Contains(a.log.String(), "this mirror lost the lease") {
		t.Errorf("b leads, and a still believes that it does:\n%s", a.log)
	}

	before := versions(t, consul)
	l.mend()
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if after := versions(t, consul); !maps.Equal(before, after) {
			t.Fatalf("a mirror without the lease wrote: before %v, after %v", before, after)
		}
	}
	if err := b.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	head = o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/3")})
	seen.status(func(s deployments.MirrorState) bool { return s.Holder == "a" && s.Head == head })
	if got := seen.runs("prod/web/app", "app/3"); got.Generation != 3 {
		t.Errorf("record %+v", got)
	}
}
