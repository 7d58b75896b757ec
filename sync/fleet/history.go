package fleet

import (
	"cmp"
	"context"
	"errors"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/kv"
)

// histories caches histories, by unit. Only pinned units' histories are read, to count how many releases Git is ahead.
type histories map[deployments.UnitID]versioned

type versioned struct {
	record  uint64 // version of the record when entries were read: a generation is written together with its record
	entries []kv.Entry
}

// historyWithin bounds how long reading a fleet waits for histories.
const historyWithin = 2 * time.Second

// of returns the history entries of each unit that filter takes and that has, among entries, both a record and a pin,
// of the whole unit or of a node. If a history can't be read now, it returns the last known one, if any: histories are
// only shown, and decide nothing. One that may not be read is empty.
func (h histories) of(ctx context.Context, store kv.Store, filter Filter, entries []kv.Entry) []kv.Entry {
	ctx, cancel := context.WithTimeout(ctx, historyWithin)
	defer cancel()
	pinned := map[deployments.UnitID]bool{}
	records := map[deployments.UnitID]uint64{}
	for _, e := range entries {
		kind, rest, _ := strings.Cut(e.Key, "/")
		parts := strings.SplitN(rest, "/", 4)
		if len(parts) < 3 {
			continue
		}
		id := deployments.UnitID{Stage: parts[0], Role: parts[1], Unit: parts[2]}
		switch {
		case !filter.takes(id) || id.Check() != nil:
		case kind+"/" == kv.DesiredPrefix:
			records[id] = e.Version
		case kind+"/" == kv.PinsPrefix:
			pinned[id] = true
		}
	}
	var all []kv.Entry
	for id := range pinned {
		version, ok := records[id]
		if !ok {
			continue
		}
		if known, ok := h[id]; !ok || known.record != version {
			read, err := store.List(ctx, kv.HistoryPrefixOf(id))
			if err == nil || errors.Is(err, kv.ErrDenied) { // denied: the unit has no history
				h[id] = versioned{version, read}
			}
		}
		all = append(all, h[id].entries...)
	}
	return all
}

// gitAhead returns Unit.GitAhead. history is that of u, in any order. Without a record the result
// is nil.
func gitAhead(u *Unit, history []deployments.History, now time.Time) map[deployments.Pointer]int {
	if u.Record == nil {
		return nil
	}
	history = slices.Clone(history)
	slices.SortFunc(history, newestFirst)
	named := []deployments.Pointer{namedByGit(u.Record.Target, u.Record.Pinned)}
	for _, h := range history {
		// Rollbacks and retries begin generations, too, without a change in Git.
		if p := namedByGit(h.Release, h.Pinned); !p.IsZero() && p != named[len(named)-1] {
			named = append(named, p)
		}
	}
	counts := map[deployments.Pointer]int{}
	for _, p := range heldReleases(u, now) {
		if i := slices.Index(named, p); i >= 0 {
			counts[p] = i
		}
	}
	return counts
}

// namedByGit returns the release that Git names. target and pinned are fields of a record, or of a history entry. While
// a unit pin is rolled out, target is the pin's release, and pinned has Git's.
func namedByGit(target deployments.Pointer, pinned *deployments.Pinned) deployments.Pointer {
	if pinned != nil {
		return pinned.Target
	}
	return target
}

// heldReleases returns the releases that u's pins name, and those that live nodes under a hold pin run. Expired pins
// don't count.
func heldReleases(u *Unit, now time.Time) []deployments.Pointer {
	var all []deployments.Pointer
	add := func(pin deployments.Pin, holds func(Node) bool) {
		switch {
		case pin.Expired(now):
		case pin.Hold:
			all = append(all, running(u, holds)...)
		default:
			all = append(all, pin.Release)
		}
	}
	if u.Pin != nil {
		add(*u.Pin, func(n Node) bool { return !u.hasOwnPin(n.Name, now) })
	}
	for _, pin := range u.Pins {
		if !pin.Hold {
			add(pin, nil)
		}
	}
	return append(all, running(u, func(n Node) bool {
		return u.hasOwnPin(n.Name, now) && u.Pins[n.Name].Hold
	})...)
}

// hasOwnPin reports whether a pin of the node's own decides at now. An expired one doesn't.
func (u *Unit) hasOwnPin(node string, now time.Time) bool {
	pin, has := u.Pins[node]
	return has && !pin.Expired(now)
}

// running returns the releases of the live nodes for which selected returns true, one for each node.
func running(u *Unit, selected func(Node) bool) []deployments.Pointer {
	var all []deployments.Pointer
	for _, n := range u.Nodes {
		if !n.Gone && selected(n) && !n.Report.Running.IsZero() {
			all = append(all, n.Report.Running)
		}
	}
	return all
}

// readHistory parses an entry of a unit's history. If it doesn't parse, the result has only its generation, and a
// Note that says so.
func readHistory(e kv.Entry) deployments.History {
	h, err := deployments.ParseHistory(e.Value)
	if err != nil {
		h = deployments.History{Note: "does not parse: " + err.Error()}
		h.Generation, _ = strconv.ParseInt(path.Base(e.Key), 10, 64)
	}
	return h
}

func newestFirst(a, b deployments.History) int { return cmp.Compare(b.Generation, a.Generation) }
