package deploy

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"kedge/deployments"
)

func TestHealthIsLostAndFound(t *testing.T) {
	t.Parallel()
	bad, good := round{"tcp :80", errors.New("refused")}, round{}
	start := time.Now()
	for _, c := range []struct {
		name   string
		rounds string // + passes, - fails, one each 10 s
		stable time.Duration
		want   string // u: unhealthy after that round
	}{
		{"never", "+++++", 0, "....."},
		{"two in a row are borne", "--+--+--", 0, "........"},
		{"three in a row are not", "---+", 0, "..u."},
		{"it stays so until one passes", "-----+", 0, "..uuu."},
		{"one good stable_for ends it", "---+++", 20 * time.Second, "..uuu."},
		{"and no bad one", "---++-+++", 20 * time.Second, "..uuuuuu."},
		{"it can begin again", "---+---", 0, "..u...u"},
	} {
		var h Health
		var got strings.Builder
		for i, kind := range c.rounds {
			r := good
			if kind == '-' {
				r = bad
			}
			h = h.next(r, 3, c.stable, start.Add(time.Duration(i)*10*time.Second))
			got.WriteString(map[bool]string{true: "u", false: "."}[h.Unhealthy])
			if h.Unhealthy != (h.Reason == deployments.ReasonUnhealthy) || h.Unhealthy != (h.Facts["check"] == "tcp :80") {
				t.Errorf("%s: round %d says %+v", c.name, i, h)
			}
		}
		if got.String() != c.want {
			t.Errorf("%s: got %s, want %s", c.name, got.String(), c.want)
		}
	}
}

func TestMonitorTellsChangesAlone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex // of what a check finds
		identity, failing := "1", error(nil)
		find := func(id string, err error) {
			mu.Lock()
			defer mu.Unlock()
			identity, failing = id, err
		}
		m := &Monitor{every: 10 * time.Second, failures: 3, identities: make([]string, 2), checks: []watch{
			{name: "tcp", timeout: time.Second, try: func(context.Context) (string, error) {
				mu.Lock()
				defer mu.Unlock()
				return identity, failing
			}},
			{name: "slow", timeout: time.Second, try: func(ctx context.Context) (string, error) { return "", ctx.Err() }},
		}}
		ctx, cancel := context.WithCancel(t.Context())
		var told []Health
		done := make(chan struct{})
		go func() { m.Run(ctx, Health{}, func(h Health) { told = append(told, h) }); close(done) }()
		sleep := func(d time.Duration) {
			time.Sleep(d)
			synctest.Wait()
		}
		sleep(5 * time.Minute)
		find("2", nil) // one restart is borne
		sleep(time.Minute)
		if len(told) > 0 {
			t.Fatalf("told of %+v while all is well", told)
		}
		find("2", errors.New("refused"))
		sleep(time.Minute)
		if len(told) != 1 || !told[0].Unhealthy || told[0].Facts["check"] != "tcp" || told[0].Facts["error"] != "refused" {
			t.Fatalf("told of %+v", told)
		}
		find("2", nil)
		sleep(time.Minute)
		if len(told) != 2 || told[1].Unhealthy {
			t.Fatalf("told of %+v", told)
		}
		cancel()
		<-done
	})
}

func TestMonitorOfAUnit(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	u := w.open(nil)
	if m, err := u.Monitor(); m != nil || err != nil {
		t.Errorf("nothing runs: %v, %v", m, err)
	}
	w.deploy(u, w.publish("1", func(m *deployments.Manifest) {
		m.Health = deployments.Health{Every: time.Millisecond, Failures: 2, Checks: []deployments.Check{
			{Exec: "test -e " + w.path("db"), During: deployments.DuringDeploy}, {Exec: "test ! -e " + w.path("sick")},
		}}
		m.Commands.Post = []deployments.Command{{Run: "touch " + w.path("db")}}
	}))
	if err := os.Remove(w.path("db")); err != nil {
		t.Fatal(err)
	}
	m, err := u.Monitor()
	if err != nil || m == nil {
		t.Fatalf("got %v, %v", m, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	told := make(chan Health)
	go m.Run(ctx, Health{}, func(h Health) { told <- h })
	for _, want := range []bool{true, false} {
		var err error
		if want {
			err = os.WriteFile(w.path("sick"), nil, 0o600)
		} else {
			err = os.Remove(w.path("sick"))
		}
		if err != nil {
			t.Fatal(err)
		}
		if h := <-told; h.Unhealthy != want {
			t.Errorf("got %+v, want unhealthy %t", h, want)
		}
	}
	w.deploy(u, w.publish("2", nil))
	if m, err := u.Monitor(); m != nil || err != nil {
		t.Errorf("without checks: %v, %v", m, err)
	}
}

// BenchmarkMonitorRound measures what a round costs the node: the aim is 10 ms for three checks each 10 s.
func BenchmarkMonitorRound(b *testing.B) {
	w := newWorld(b)
	u := w.open(nil)
	s := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer s.Close()
	server := s.URL
	w.deploy(u, w.publish("1", func(m *deployments.Manifest) {
		m.Health = deployments.Health{Checks: []deployments.Check{
			{HTTP: &deployments.HTTPCheck{URL: server}}, {TCP: strings.TrimPrefix(server, "http://")}, {Exec: "true"},
		}}
	}))
	m, err := u.Monitor()
	if err != nil {
		b.Fatal(err)
	}
	before := usage(b)
	for b.Loop() {
		if r := m.round(b.Context()); r.err != nil {
			b.Fatal(r.err)
		}
	}
	b.ReportMetric(float64((usage(b)-before).Microseconds())/1000/float64(b.N), "cpu-ms/round")
}

// usage is the processor time of this process and of the children that it waited for.
func usage(b *testing.B) (total time.Duration) {
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var r syscall.Rusage
		if err := syscall.Getrusage(who, &r); err != nil {
			b.Fatal(err)
		}
		total += time.Duration(r.Utime.Nano() + r.Stime.Nano())
	}
	return total
}
