package agent

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"kedge/deployments"
)

// A unit whose source says next to nothing holds no other unit up.
func TestSlowSourceHoldsNobodyUp(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	files := http.FileServer(http.Dir(w.path("releases")))
	asked := make(chan struct{}, 100)
	server := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "slow") {
			asked <- struct{}{}
			<-r.Context().Done()
			return
		}
		files.ServeHTTP(rw, r)
	}))
	t.Cleanup(server.Close)
	slow, quick := unitID("slow"), unitID("quick")
	over := func(p deployments.Pointer) deployments.Pointer {
		p.URL = strings.Replace(p.URL, "file://"+w.path("releases"), server.URL, 1)
		return p
	}
	w.desire(slow, deployments.Record{Target: over(w.publish("slow", "1")), Generation: 1})
	release := over(w.publish("quick", "1"))
	a := w.start()
	<-asked
	w.desire(quick, deployments.Record{Target: release, Generation: 1})
	a.awaitRunning(quick, release)
	if u := a.unit(slow); u.State == deployments.StateConverged {
		t.Errorf("the slow one is %+v", u)
	}
}
