package agent

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"kedge/deployments"
)

// dripping answers with the first byte of a body, and then nothing more until the client goes away.
type dripping struct {
	http.ResponseWriter
	r     *http.Request
	begun chan<- struct{}
}

func (d *dripping) Write(p []byte) (int, error) {
	if len(p) == 1 { // whoever asks for the size alone has all
		return d.ResponseWriter.Write(p)
	}
	n, err := d.ResponseWriter.Write(p[:1])
	d.ResponseWriter.(http.Flusher).Flush()
	d.begun <- struct{}{}
	<-d.r.Context().Done()
	return n, errors.Join(err, d.r.Context().Err())
}

// Units whose source sends almost nothing, of a manifest or of an archive, hold up no other unit.
func TestSlowSourceHoldsNobodyUp(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	files := http.FileServer(http.Dir(w.path("releases")))
	asked := make(chan struct{}, 100)
	begun := make(chan struct{}, 100)
	server := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "slow") {
			asked <- struct{}{}
			<-r.Context().Done()
			return
		}
		if strings.Contains(r.URL.Path, "drip") && strings.HasSuffix(r.URL.Path, "archive.tar.zst") {
			files.ServeHTTP(&dripping{rw, r, begun}, r)
			return
		}
		files.ServeHTTP(rw, r)
	}))
	t.Cleanup(server.Close)
	slow, drip, quick := unitID("slow"), unitID("drip"), unitID("quick")
	over := func(p deployments.Pointer) deployments.Pointer {
		p.URL = strings.Replace(p.URL, "file://"+w.path("releases"), server.URL, 1)
		return p
	}
	w.desire(slow, deployments.Record{Target: over(w.publish("slow", "1")), Generation: 1})
	w.desire(drip, deployments.Record{Target: over(w.publish("drip", "1")), Generation: 1})
	release := over(w.publish("quick", "1"))
	a := w.start()
	<-asked
	<-begun
	w.desire(quick, deployments.Record{Target: release, Generation: 1})
	a.awaitRunning(quick, release)
	for _, id := range []deployments.UnitID{slow, drip} {
		if u := a.unit(id); u.State == deployments.StateConverged {
			t.Errorf("%s is %+v", id, u)
		}
	}
}
