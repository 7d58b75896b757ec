package web

import (
	"bytes"
	"compress/gzip"
	"net/http"
	"regexp"
	"slices"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
)

// focusable finds what the Tab key stops at.
var focusable = regexp.MustCompile(`<(?:a [^>]*href=|button|input|select|textarea|[a-z]+ [^>]*tabindex="0")`)

// The pages of a large fleet stay within what people and their networks bear. The figures before are those of the
// dashboard that drew every node of every unit as a row: 2.2 MB and 20,421 tab stops for 200 units of 100 nodes, and
// 55 MB in 10 s while one node changed.
func TestFiguresOfALargeFleet(t *testing.T) {
	t.Parallel()
	const (
		maxBytes     = 100 << 10 // of a page, compressed
		maxTime      = time.Second
		maxStops     = 200
		maxLive      = 5000 // bytes a second
		beforeBytes  = 2_200_000
		beforeStops  = 20_421
		beforeStream = 5_500_000
	)
	cache := deployments.RoleID{Stage: "prod", Role: "cache"}
	changedIn := map[string]kv.Entry{
		"200 units of 100 nodes": reportIn(cache, nodeName(cache, 5),
			map[string]deployments.UnitReport{"app": runs("1.4.9"), "base": runs("base-7")}),
		"a unit of 10,000 nodes": report("web-05000", runs("1.4.9")),
	}
	for name, s := range map[string]scene{
		"200 units of 100 nodes": bigScene(), "a unit of 10,000 nodes": appScene(10_000, deployments.PhaseRolling),
	} {
		addresses := []string{"", "-/overrides"}
		if name == "a unit of 10,000 nodes" {
			addresses = append(addresses, "prod/web/app", "prod/web/app/web-05000")
		}
		w := offline(t, s)
		now, _ := w.latest()
		before := map[string]*rendered{}
		for _, address := range addresses {
			var r *rendered
			var html string
			took := time.Hour
			for range 5 { // what else the machine does at the time is no fault of the page
				begun := time.Now()
				r = w.render(t.Context(), now, address, nil)
				html = markup(document(r))
				if took = min(took, time.Since(begun)); took <= maxTime {
					break
				}
			}
			var packed bytes.Buffer
			z := gzip.NewWriter(&packed)
			_, _ = z.Write([]byte(html))
			_ = z.Close()
			before[address] = r
			stops := len(focusable.FindAllString(html, -1))
			t.Logf("%s, /%s: %d bytes compressed (%d plain, %d before), %d tab stops (%d before), drawn in %s",
				name, address, packed.Len(), len(html), beforeBytes, stops, beforeStops, took.Round(time.Millisecond))
			if r.code != http.StatusOK || packed.Len() > maxBytes || stops > maxStops || stops == 0 ||
				took > maxTime {
				t.Errorf("%s, /%s: answers %d; more than %d bytes, %d tab stops or %s", name, address, r.code,
					maxBytes, maxStops, maxTime)
			}
		}
		i := slices.IndexFunc(s.entries, func(e kv.Entry) bool { return e.Key == changedIn[name].Key })
		s.entries[i] = changedIn[name]
		w.show(s.assemble())
		now, _ = w.latest()
		for _, address := range addresses {
			event, err := encodePatch(patchOf(before[address], w.render(t.Context(), now, address, nil)))
			if err != nil {
				t.Fatal(err)
			}
			rate := float64(len(event)) / pauseAfter(string(event)).Seconds()
			t.Logf("%s, /%s: %.0f bytes/s while one node changes (%d before)", name, address, rate, beforeStream)
			if rate > maxLive {
				t.Errorf("%s, /%s: more than %d bytes/s", name, address, maxLive)
			}
		}
	}
}
