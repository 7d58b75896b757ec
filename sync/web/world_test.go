package web

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/fleet"
)

var app = deployments.UnitID{Stage: "prod", Role: "web", Unit: "app"}

func release(version string) deployments.Pointer {
	return deployments.Pointer{URL: "s3://acme-releases/app/" + version + "/manifest.yaml",
		Digest: sha256.Sum256([]byte(version))}
}

func encode(v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return data
}

func entry(key string, v any) kv.Entry { return kv.Entry{Key: key, Value: encode(v), Version: 1} }

// reportIn is what a live node says of units.
func reportIn(role deployments.RoleID, node string, units map[string]deployments.UnitReport) kv.Entry {
	e := entry(kv.StatusKey(role.Stage, role.Role, node), deployments.Report{Node: node, Agent: "1.5.0",
		Started: time.Now(), Units: units})
	e.Session = "session-of-" + node
	return e
}

// report is what a live node says of the app.
func report(node string, r deployments.UnitReport) kv.Entry {
	return reportIn(app.RoleID(), node, map[string]deployments.UnitReport{"app": r})
}

func runs(version string) deployments.UnitReport {
	p := release(version)
	return deployments.UnitReport{
		State: deployments.StateConverged, Running: p, Want: p, Version: version, Generation: 2,
		Since: time.Now().Add(-3 * time.Hour).Truncate(time.Second),
	}
}

func failed(version, why string) deployments.UnitReport {
	r := runs(version)
	r.State, r.Want, r.Quarantined, r.Error = deployments.StateQuarantined, release("1.5.0"),
		[]deployments.Digest{release("1.5.0").Digest}, why
	r.Reason, r.Facts = deployments.ReasonQuarantined, deployments.Facts{"step": "health", "error": why}
	return r
}

func unhealthy(version, check, why string) deployments.UnitReport {
	r := runs(version)
	r.State, r.Error = deployments.StateUnhealthy, check+": "+why
	r.Reason, r.Facts = deployments.ReasonUnhealthy, deployments.Facts{"check": check, "error": why}
	return r
}

// mirrorEntries are those of a mirror that runs.
func mirrorEntries() []kv.Entry {
	lease := entry(kv.MirrorLease, map[string]string{"holder": "mirror-1"})
	lease.Session = "session-of-mirror-1"
	return []kv.Entry{lease, entry(kv.MirrorKey, deployments.MirrorState{
		Holder: "mirror-1", Head: "4f2c91ab77d0c0ffee00c0ffee00c0ffee00c0ff", Author: "Ada Byron <ada@acme.example>",
		At: time.Now().Add(-7 * time.Minute), Freeze: windows(time.Now().UTC()), FreezeOmitted: 2,
	})}
}

// windows are freeze windows that are open now, and not.
func windows(now time.Time) []deployments.FreezeWindow {
	weekday := func(days int) string { return now.AddDate(0, 0, days).Format("Mon") }
	return []deployments.FreezeWindow{
		{Name: "weekend", Deny: "0 16 * * " + weekday(2), Duration: "64h", Zone: "Europe/Berlin", Reason: "nobody is there"},
		{Name: "office hours", Allow: "0 9 * * MON-FRI", Duration: "8h", Units: []string{"prod/*/*", "staging/*/*"},
			Zone: "America/New_York"},
		{Name: "audit", Deny: "0 0 * * " + weekday(-1), Duration: "72h", Running: "wait", Units: []string{"prod/db/*"},
			Reason: "the auditors look at what runs, and it must be what they looked at last week"},
		{Name: "backup", Deny: "30 */4 * * *", Duration: "20m", Units: []string{"*/db/*"}},
		{Deny: "0 0 1 " + fmt.Sprint(int(now.AddDate(0, 3, 0).Month())) + " *", Duration: "24h"},
	}
}

// recordOf is a record whose newest change is told in its history.
func recordOf(id deployments.UnitID, r deployments.Record, subject string) []kv.Entry {
	r.Commit = "4f2c91ab77d0c0ffee00c0ffee00c0ffee00c0ff"
	h := deployments.History{
		Generation: r.Generation, Release: r.Target, Stable: r.Stable, Commit: r.Commit,
		Author: "Ada Byron <ada@acme.example>", Subject: subject,
		At: time.Now().Add(-26 * time.Minute).Truncate(time.Second),
	}
	return []kv.Entry{entry(kv.DesiredKey(id), r), entry(kv.HistoryKey(id, r.Generation), h)}
}

// scene is a fleet in one of the situations that pages are looked at in.
type scene struct {
	name    string
	entries []kv.Entry
	// node is the path of a node that is worth a look; before are what the fleet was earlier.
	node   string
	before []*fleet.Fleet
	// trouble is why the store can't be read.
	trouble string
}

// smallScene is one unit of three nodes.
func smallScene() scene {
	all := mirrorEntries()
	all = append(all, recordOf(app, deployments.Record{Target: release("1.4.2"), Stable: release("1.4.2"),
		Generation: 2}, "web: release 1.4.2")...)
	for i := range 3 {
		all = append(all, report(fmt.Sprintf("web-%d", i+1), runs("1.4.2")))
	}
	return scene{name: "small", entries: all, node: "/prod/web/app/web-1"}
}

// appScene is the app on some nodes during a rollout, or while it goes back.
func appScene(nodes int, phase deployments.Phase) scene {
	target, stable := release("1.5.0"), release("1.4.2")
	const half = 1 << 63
	p := &deployments.Progress{Phase: phase, Cutoff: half, Promoted: true,
		Since: time.Now().Add(-4 * time.Minute).Truncate(time.Second)}
	switch phase {
	case deployments.PhaseRollingBack:
		p.Reason, p.Facts = deployments.ReasonTooManyFailed, deployments.Facts{"failed": "12",
			"of": fmt.Sprint(nodes), "node": "web-00007", "limit": "0",
			"error": "health: GET /health: 503 Service Unavailable"}
		p.Message, p.Failed = "12 nodes failed: web-00007: health: GET /health: 503 Service Unavailable", target.Digest
	default:
		p.Reason, p.Facts = deployments.ReasonRolling, deployments.Facts{"admitted": fmt.Sprint(nodes / 2),
			"of": fmt.Sprint(nodes)}
		p.Message = fmt.Sprintf("%d of %d nodes admitted", nodes/2, nodes)
	}
	all := mirrorEntries()
	all = append(all, recordOf(app, deployments.Record{Target: target, Stable: stable, Generation: 3, Paced: true,
		Rollout: p}, "web: release 1.5.0")...)
	for g, version := range []string{"1.4.1", "1.4.2"} {
		all = append(all, entry(kv.HistoryKey(app, int64(g+1)), deployments.History{
			Generation: int64(g + 1), Release: release(version), Commit: "77d0c0ffee00c0ffee00c0ffee00c0ff4f2c91ab",
			Author:  "Lin <lin@acme.example>",
			Subject: "web: release " + version, At: time.Now().Add(-time.Duration(5-g) * 24 * time.Hour),
			Note: []string{"", "promoted by lin"}[g],
		}))
	}
	for i := range nodes {
		name := fmt.Sprintf("web-%05d", i)
		r := runs("1.4.2")
		if policy.Rank(name, target.Digest) <= half {
			switch {
			case i%97 == 7 && i < 1200:
				r = failed("1.4.2", "health: GET http://127.0.0.1:8080/health: 503 Service Unavailable")
			case i%41 == 3:
				r.State, r.Want, r.Fetched, r.Total = deployments.StateFetching, target, 40, 100
			case i%53 == 5:
				r.State, r.Want = deployments.StateSwitching, target
			default:
				r = runs("1.5.0")
			}
		}
		r.Generation = 3
		e := report(name, r)
		if i%251 == 9 {
			e.Session = ""
		}
		all = append(all, e)
	}
	s := scene{name: fmt.Sprintf("app-%d-%s", nodes, phase), entries: all, node: "/prod/web/app/web-00007"}
	for i := range 30 { // it came here step by step
		some := recordOf(app, deployments.Record{Target: target, Stable: stable, Generation: 3, Paced: true, Rollout: p}, "")
		for n := range 60 {
			version := "1.4.2"
			if n < i {
				version = "1.5.0"
			}
			some = append(some, report(fmt.Sprintf("web-%05d", n), runs(version)))
		}
		s.before = append(s.before, fleet.Assemble(some, time.Now().Add(-time.Duration(300-8*i)*time.Second)))
	}
	return s
}

// bigScene is 200 units over 10,000 nodes: 100 roles of 100 nodes, each with two units. Some things go wrong in it.
func bigScene() scene {
	all := mirrorEntries()
	services := []string{"api", "billing", "cache", "catalog", "checkout", "edge", "events", "feed", "gateway",
		"identity", "images", "jobs", "ledger",
		"mail", "media", "orders", "payments", "pricing", "profile", "push", "queue", "ratings", "search", "sessions", "web"}
	i := 0
	for _, stage := range []string{"prod", "prod-eu", "prod-us", "staging"} {
		for _, service := range services {
			i++
			role := deployments.RoleID{Stage: stage, Role: service}
			base, main := role.Unit("base"), role.Unit("app")
			target, stable := "1."+fmt.Sprint(i%9+1)+".2", "1."+fmt.Sprint(i%9+1)+".1"
			record := deployments.Record{Target: release(target), Stable: release(target), Generation: 4, Paced: true}
			since := time.Now().Add(-4 * time.Minute).Truncate(time.Second)
			state := func(n int) deployments.UnitReport { return runs(target) }
			switch i {
			case 3, 31, 57, 88:
				record.Stable = release(stable)
				record.Rollout = &deployments.Progress{Phase: deployments.PhaseRolling, Cutoff: 1 << 63, Promoted: true,
					Since: since, Reason: deployments.ReasonRolling}
				state = func(n int) deployments.UnitReport {
					if policy.Rank(nodeName(role, n), release(target).Digest) <= 1<<63 && n%17 != 3 {
						return runs(target)
					}
					return runs(stable)
				}
			case 5:
				record.Stable = release(stable)
				record.Rollout = &deployments.Progress{
					Phase: deployments.PhaseRolledBack, Since: since, Reason: deployments.ReasonTooManyFailed,
					Failed: release(target).Digest,
					Facts: deployments.Facts{"failed": "2", "of": "100", "node": nodeName(role, 7), "limit": "0",
						"error": "health: GET /health: connection refused"},
					Message: "2 of 100 nodes failed: " + nodeName(role, 7) + ": health: GET /health: connection refused",
				}
				state = func(n int) deployments.UnitReport { return runs(stable) }
			case 12:
				record.Stable = release(stable)
				record.Rollout = &deployments.Progress{
					Phase: deployments.PhaseCanary, Cutoff: 1 << 58, Since: since, HealthySince: since,
					Reason: deployments.ReasonBaking,
					Facts: deployments.Facts{"who": "the canaries",
						"until": time.Now().Add(6 * time.Minute).UTC().Format("2006-01-02 15:04:05Z")},
				}
				state = func(n int) deployments.UnitReport {
					if policy.Rank(nodeName(role, n), release(target).Digest) <= 1<<58 {
						return runs(target)
					}
					return runs(stable)
				}
			case 20:
				record.Stable = release(stable)
				record.Rollout = &deployments.Progress{
					Phase: deployments.PhaseFrozen, Since: since, Reason: deployments.ReasonFrozen,
					Message: "frozen by weekend until 2026-11-30 07:00Z",
					Facts: deployments.Facts{"window": "weekend", "until": "2036-11-30T07:00:00Z",
						"reason": "no changes over the weekend"},
				}
				state = func(n int) deployments.UnitReport { return runs(stable) }
			case 40:
				record.Stable = release(stable)
				record.Rollout = &deployments.Progress{Phase: deployments.PhasePendingApproval, Cutoff: 1 << 58,
					Since: since, HealthySince: since, Reason: deployments.ReasonAwaitingApproval}
				state = func(n int) deployments.UnitReport { return runs(stable) }
			case 66:
				state = func(n int) deployments.UnitReport {
					if n%30 == 4 {
						return unhealthy(target, "http http://127.0.0.1:8080/ready", "503 Service Unavailable")
					}
					return runs(target)
				}
			case 70:
				all = append(all, entry(kv.PinKey(main), map[string]any{
					"release": release(stable).String(), "by": "lin", "reason": "1.8 leaks memory", "at_once": true,
					"until": time.Now().Add(9 * time.Hour).UTC().Format(time.RFC3339),
				}))
				state = func(n int) deployments.UnitReport {
					r := runs(stable)
					r.Pinned = true
					return r
				}
			case 71:
				all = append(all, kv.Entry{Key: kv.NodePinKey(main, nodeName(role, 11)), Value: []byte("hold"), Version: 1})
			case 90:
				all = append(all, kv.Entry{Key: kv.PinKey(base), Value: []byte("{hold: true, by: ada, reason: audit}"), Version: 1})
			}
			all = append(all, recordOf(main, record, service+": release "+target)...)
			all = append(all, recordOf(base, deployments.Record{Target: release("base-7"), Stable: release("base-7"),
				Generation: 1}, "base: release 7")...)
			for n := range 100 {
				r := state(n)
				r.Generation = 4
				b := runs("base-7")
				b.Generation = 1
				if i == 90 {
					b.State, b.Pinned = deployments.StateHeld, true
				}
				e := reportIn(role, nodeName(role, n), map[string]deployments.UnitReport{"app": r, "base": b})
				if i%13 == 4 && n%40 == 6 {
					e.Session = ""
				}
				all = append(all, e)
			}
		}
	}
	return scene{name: "big", entries: all, node: "/prod/search/app/prod-search-004"}
}

func nodeName(role deployments.RoleID, n int) string {
	return fmt.Sprintf("%s-%s-%03d", role.Stage, role.Role, n)
}

// awayScene is a unit's node that is unhealthy, seen while the store can't be read.
func awayScene() scene {
	s := smallScene()
	s.name = "away"
	s.trouble = "read status/: the store is unavailable: dial tcp 127.0.0.1:8500: connect: connection refused"
	ill := report("web-2", unhealthy("1.4.2", "http http://127.0.0.1:8080/ready", "503 Service Unavailable"))
	s.entries[slices.IndexFunc(s.entries, func(e kv.Entry) bool { return e.Key == ill.Key })] = ill
	s.node = "/prod/web/app/web-2"
	return s
}

// assemble is the scene as a fleet.
func (s scene) assemble() *fleet.Fleet {
	f := fleet.Assemble(s.entries, time.Now())
	if s.trouble != "" {
		f.Errors[kv.StatusPrefix] = s.trouble
	}
	return f
}
