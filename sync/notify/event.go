package notify

import (
	"fmt"
	"slices"
	"time"

	"kedge/deployments"
	"kedge/deployments/safetext"
	"kedge/sync/fleet/message"
)

// Kind is the kind of an event.
type Kind string

const (
	KindStarted         Kind = "started"          // a unit has a new target
	KindCompleted       Kind = "completed"        // a rollout ended with its target
	KindPendingApproval Kind = "pending-approval" // a rollout waits for kedge promote
	KindFrozen          Kind = "frozen"           // a rollout waits for a freeze window to end
	KindPaused          Kind = "paused"           // a rollout stopped, and waits for an operator
	KindRollingBack     Kind = "rolling-back"     // a rollout turned back, to what served before
	KindRolledBack      Kind = "rolled-back"      // a rollback ended
	KindOrphaned        Kind = "orphaned"         // Git no longer names the unit, and its record stays
	KindUnhealthy       Kind = "unhealthy"        // a unit's health checks fail on a live node, after they failed on none
	KindRecovered       Kind = "recovered"        // a unit's health checks fail on no live node any more
	KindRefused         Kind = "refused"          // the mirror doesn't take a commit
)

// Kinds returns every kind.
func Kinds() []Kind {
	return []Kind{KindStarted, KindCompleted, KindPendingApproval, KindFrozen, KindPaused, KindRollingBack, KindRolledBack,
		KindOrphaned, KindUnhealthy, KindRecovered, KindRefused}
}

// Event is one notification. A repeated notification has the same ID.
type Event struct {
	ID   string
	Kind Kind
	At   time.Time // zero: not known
	Data Data
}

// Data has an event's details. Fields that don't apply are left out.
type Data struct {
	Unit       string              `json:"unit,omitempty"`
	Release    deployments.Pointer `json:"release,omitzero"`
	Stable     deployments.Pointer `json:"stable,omitzero"`
	Generation int64               `json:"generation,omitempty"`
	Phase      deployments.Phase   `json:"phase,omitempty"`
	Reason     deployments.Reason  `json:"reason,omitempty"`
	Facts      deployments.Facts   `json:"facts,omitempty"`
	Commit     string              `json:"commit,omitempty"`
	Author     string              `json:"author,omitempty"`
	Subject    string              `json:"subject,omitempty"`
	Nodes      []string            `json:"nodes,omitempty"`
	// Message is the event in one line, for people. Link leads to the unit's page, if Config.Link is set.
	Message string `json:"message"`
	Link    string `json:"link,omitempty"`
}

// maxShown is the length in bytes at which sanitize cuts a text.
const maxShown = 4 << 10

// sanitize cleans texts by commits, operators and nodes. It removes control characters, hides what may be secret in
// URLs, such as a signature, and cuts long texts.
func (d *Data) sanitize() {
	shown := func(s string) string { return safetext.Clip(message.OneLine(safetext.URLs(s)), maxShown) }
	d.Message, d.Author, d.Subject = shown(d.Message), shown(d.Author), shown(d.Subject)
	d.Release.URL, d.Stable.URL = safetext.URLs(d.Release.URL), safetext.URLs(d.Stable.URL)
	facts := make(deployments.Facts, len(d.Facts))
	for name, value := range d.Facts {
		facts[name] = shown(value)
	}
	d.Facts = facts
}

// notified is the last state of a unit that a receiver was notified of. RolloutState is what
// rolloutState returned.
type notified struct {
	Generation   int64  `json:"generation"`
	RolloutState string `json:"standing,omitempty"`
	Unhealthy    bool   `json:"unhealthy,omitempty"`
	// HealthChanges counts the notifications about the nodes' health, so that each has an ID of its own.
	HealthChanges int64 `json:"health_changes,omitempty"`
	// Status is the hash of the commit status that was last written; see hashOf.
	Status string `json:"status,omitempty"`
}

// unitNow is the current state of a unit.
type unitNow struct {
	id     deployments.UnitID
	record deployments.Record
	// history has the entries of the last generations, oldest first; nil until sendNew reads them.
	history []deployments.History
	// unhealthy are the live nodes on which the unit fails its checks, sorted. If known is false, they don't count.
	unhealthy   []string
	healthKnown bool
}

// orphanedMidway is the rolloutState of an orphaned record with a rollout, which goes on if Git
// names the unit again.
const orphanedMidway = "orphaned-midway"

// rolloutState returns a text that changes when there may be something to notify of. For an
// orphaned record it is "orphaned" or orphanedMidway, for one without a rollout "completed". It is
// empty while a rollout is at its canaries or rolling. In other phases it is the phase and its
// Since.
func rolloutState(r deployments.Record) string {
	switch p := r.Rollout; {
	case r.Orphaned && p != nil:
		return orphanedMidway
	case r.Orphaned:
		return string(KindOrphaned)
	case p == nil:
		return string(KindCompleted)
	case p.Phase == deployments.PhaseCanary, p.Phase == deployments.PhaseRolling:
		return "" // goes on
	default:
		return fmt.Sprintf("%s@%d", p.Phase, p.Since.Unix())
	}
}

// eventsSince returns the events about a unit that a receiver lacks, in order. was is the unit's
// state that the receiver was last notified of, u is its state now. now is what the receiver is
// notified of after these events, without Status, which the caller sets. Only generations in
// u.history have an event "started".
func eventsSince(was notified, u unitNow) (events []Event, now notified) {
	r := u.record
	now = notified{Generation: r.Generation, RolloutState: rolloutState(r), Unhealthy: was.Unhealthy,
		HealthChanges: was.HealthChanges}
	event := func(kind Kind, mark string, at time.Time, text string) {
		e := Event{Kind: kind, At: at, ID: fmt.Sprintf("%s/%d/%s/%s", u.id, r.Generation, kind, mark)}
		e.Data = Data{
			Unit:       u.id.String(),
			Release:    r.Target,
			Stable:     r.Stable,
			Generation: r.Generation,
			Commit:     r.Commit,
			Message:    text,
		}
		if h := entryOf(u.history, r.Generation); h != nil {
			e.Data.Author, e.Data.Subject = h.Author, h.Subject
		}
		if p := r.Rollout; p != nil {
			e.Data.Phase, e.Data.Reason, e.Data.Facts = p.Phase, p.Reason, p.Facts
		}
		events = append(events, e)
	}

	for _, h := range u.history {
		if h.Generation > was.Generation && h.Generation <= r.Generation && h.Failed != h.Release.Digest {
			e := Event{Kind: KindStarted, At: h.At, ID: fmt.Sprintf("%s/%d/%s", u.id, h.Generation, KindStarted)}
			e.Data = Data{Unit: u.id.String(), Release: h.Release, Stable: h.Stable, Generation: h.Generation,
				Commit: h.Commit, Author: h.Author, Subject: h.Subject,
				Message: fmt.Sprintf("%s goes to %s%s", u.id, nameOf(h.Release), suffix(h))}
			events = append(events, e)
		}
	}

	if was.Generation != now.Generation || was.RolloutState != now.RolloutState {
		p := r.Rollout
		wasOrphaned := was.RolloutState == string(KindOrphaned) || was.RolloutState == orphanedMidway
		switch {
		case r.Orphaned && wasOrphaned && was.Generation == r.Generation: // an earlier version sent it
		case r.Orphaned:
			event(KindOrphaned, "", time.Time{}, fmt.Sprintf("%s: %s", u.id, message.Text(deployments.ReasonOrphaned, nil)))
		case p == nil && was.Generation == r.Generation && was.RolloutState == string(KindOrphaned):
			// back in Git, with no rollout before or after
		case p == nil && (r.Paced || was.Generation == r.Generation && was.RolloutState != now.RolloutState):
			event(KindCompleted, "", time.Time{}, fmt.Sprintf("%s: the rollout of %s is complete", u.id, nameOf(r.Target)))
		case p == nil, now.RolloutState == "":
		case slices.Contains(Kinds(), Kind(p.Phase)):
			event(Kind(p.Phase), fmt.Sprint(p.Since.Unix()), p.Since, fmt.Sprintf("%s: %s", u.id, message.Progress(p)))
		}
	}

	if u.healthKnown && len(u.unhealthy) > 0 != was.Unhealthy {
		now.Unhealthy = len(u.unhealthy) > 0
		now.HealthChanges++
		kind, text := KindRecovered, fmt.Sprintf("%s: its health checks fail on no live node any more", u.id)
		if now.Unhealthy {
			kind, text = KindUnhealthy, fmt.Sprintf("%s fails its health checks on %s", u.id, few(u.unhealthy))
		}
		event(kind, fmt.Sprint(now.HealthChanges), time.Time{}, text)
		events[len(events)-1].Data.Nodes = u.unhealthy[:min(len(u.unhealthy), maxNodes)]
	}
	return events, now
}

// maxNodes bounds the nodes that an event names.
const maxNodes = 20

func entryOf(history []deployments.History, generation int64) *deployments.History {
	for i := range history {
		if history[i].Generation == generation {
			return &history[i]
		}
	}
	return nil
}

// suffix returns the commit's author and subject, and what else led to a generation, as far as known.
func suffix(h deployments.History) string {
	s := ""
	if h.Author != "" {
		s += ", by " + h.Author
	}
	if h.Subject != "" {
		s += ": " + h.Subject
	}
	if h.Note != "" {
		s += " (" + h.Note + ")"
	}
	return s
}

// nameOf returns a release's name for people, as Pointer.Short does.
func nameOf(p deployments.Pointer) string { return p.Short() }

func few(names []string) string {
	const shown = 5
	text := ""
	for i, name := range names[:min(len(names), shown)] {
		if i > 0 {
			text += ", "
		}
		text += name
	}
	if more := len(names) - shown; more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return text
}
