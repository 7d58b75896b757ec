package ec2

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// amazon plays the metadata service (IMDSv2) and the AutoScaling API (AWS query protocol) as their documentation
// has them.
type amazon struct {
	*httptest.Server
	tags    map[string]string // nil: not enabled in the metadata
	noToken bool              // IMDSv2 is broken, and IMDSv1 isn't

	mu      sync.Mutex
	actions []string       // ACTION group/hook/instance RESULT
	refuse  []string       // error codes and messages of the next calls that complete
	hang    map[string]int // how many of the next calls of an action are taken, and never answered
	hung    chan struct{}  // one for each of those
}

const token = "AQAAAB-token"

func startAmazon(t *testing.T, tags map[string]string) *amazon {
	a := &amazon{tags: tags, hang: map[string]int{}, hung: make(chan struct{}, 10)}
	a.Server = httptest.NewServer(a)
	t.Cleanup(a.Close)
	t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", a.URL)
	t.Setenv("AWS_ENDPOINT_URL_AUTO_SCALING", a.URL)
	t.Setenv("AWS_ACCESS_KEY_ID", "key")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
	t.Setenv("AWS_EC2_METADATA_DISABLED", "")
	return a
}

func (a *amazon) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch path := r.URL.Path; {
	case a.noToken && path == "/latest/api/token":
		w.WriteHeader(http.StatusForbidden)
	case a.noToken && strings.HasPrefix(path, "/latest/"):
		a.metadata(w, strings.TrimPrefix(path, "/latest/"))
	case path == "/latest/api/token":
		if r.Method != http.MethodPut || r.Header.Get("X-Aws-Ec2-Metadata-Token-Ttl-Seconds") == "" {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		w.Header().Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "21600")
		fmt.Fprint(w, token)
	case strings.HasPrefix(path, "/latest/"):
		if r.Header.Get("X-Aws-Ec2-Metadata-Token") != token { // version 1 is off
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		a.metadata(w, strings.TrimPrefix(path, "/latest/"))
	case path == "/" && r.Method == http.MethodPost:
		a.autoScaling(w, r)
	default:
		w.WriteHeader(http.StatusNotFound)
	}
}

func (a *amazon) metadata(w http.ResponseWriter, path string) {
	name, isTag := strings.CutPrefix(path, "meta-data/tags/instance/")
	switch value, ok := a.tags[name]; {
	case path == "dynamic/instance-identity/document":
		fmt.Fprint(w, `{"instanceId": "i-0123456789abcdef0", "region": "eu-central-1", "accountId": "123456789012"}`)
	case path == "meta-data/tags/instance" && a.tags != nil:
		var names []string
		for name := range a.tags {
			names = append(names, name)
		}
		slices.Sort(names)
		fmt.Fprint(w, strings.Join(names, "\n"))
	case isTag && ok:
		fmt.Fprint(w, value)
	default:
		w.WriteHeader(http.StatusNotFound)
	}
}

func (a *amazon) autoScaling(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	action := r.PostFormValue("Action")
	a.actions = append(a.actions, strings.TrimSpace(fmt.Sprintf("%s %s/%s/%s %s", action, r.PostFormValue("AutoScalingGroupName"),
		r.PostFormValue("LifecycleHookName"), r.PostFormValue("InstanceId"), r.PostFormValue("LifecycleActionResult"))))
	if a.hang[action] > 0 {
		a.hang[action]--
		a.hung <- struct{}{}
		a.mu.Unlock()
		<-r.Context().Done()
		a.mu.Lock()
		return
	}
	if !strings.Contains(r.Header.Get("Authorization"), "/eu-central-1/autoscaling/aws4_request") { // signed for where the instance is
		w.WriteHeader(http.StatusForbidden)
		return
	}
	w.Header().Set("Content-Type", "text/xml")
	if action == "CompleteLifecycleAction" && len(a.refuse) > 0 {
		code, message, _ := strings.Cut(a.refuse[0], " ")
		a.refuse = a.refuse[1:]
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprintf(w, `<ErrorResponse xmlns="http://autoscaling.amazonaws.com/doc/2011-01-01/"><Error><Type>Sender</Type><Code>%s</Code><Message>%s</Message></Error></ErrorResponse>`, code, message)
		return
	}
	fmt.Fprintf(w, `<%[1]sResponse xmlns="http://autoscaling.amazonaws.com/doc/2011-01-01/"><%[1]sResult/></%[1]sResponse>`, action)
}

func (a *amazon) seen(prefix string) (n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, s := range a.actions {
		if strings.HasPrefix(s, prefix) {
			n++
		}
	}
	return n
}

// completed is the last call that completed; heartbeats go on until it is answered.
func (a *amazon) completed() (last string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, s := range a.actions {
		if strings.HasPrefix(s, "Complete") {
			last = s
		}
	}
	return last
}

func TestDescribe(t *testing.T) {
	tags := map[string]string{TagStage: "prod", TagRoles: "web, db", "Name": "web", tagGroup: "web-1"}
	startAmazon(t, tags)
	i, err := Describe(t.Context())
	if err != nil || i.ID != "i-0123456789abcdef0" || i.Region != "eu-central-1" || len(i.Tags) != len(tags) || i.Tags[TagRoles] != "web, db" {
		t.Errorf("got %+v, %v", i, err)
	}
}

func TestDescribeWithoutTags(t *testing.T) {
	startAmazon(t, nil)
	i, err := Describe(t.Context())
	if err == nil || !strings.Contains(err.Error(), "InstanceMetadataTags=enabled") || i.ID == "" {
		t.Errorf("got %+v, %v", i, err)
	}
}

// Metadata that anybody on the instance could have had asked for is not asked for.
func TestDescribeByVersion2Alone(t *testing.T) {
	a := startAmazon(t, map[string]string{TagStage: "prod"})
	a.noToken = true
	if i, err := Describe(t.Context()); err == nil {
		t.Errorf("got %+v", i)
	}
}

func TestHookEndsWithItsContext(t *testing.T) {
	startAmazon(t, nil)
	ctx, cancel := context.WithCancelCause(t.Context())
	stopped := errors.New("the agent stops")
	cancel(stopped)
	h := Hook{Name: "ready", Group: "web-1", Instance: Instance{ID: "i-1", Region: "eu-central-1"}, Timeout: time.Hour, Log: slog.New(slog.DiscardHandler)}
	if err := h.Run(ctx, make(chan struct{})); !errors.Is(err, stopped) {
		t.Errorf("got %v", err)
	}
}

func TestHook(t *testing.T) {
	const group = "web-1/ready/i-0123456789abcdef0"
	for name, c := range map[string]struct {
		refuse    []string
		converges bool
		timeout   time.Duration
		want      string
	}{
		"converged":                {converges: true, timeout: time.Hour, want: "CONTINUE"},
		"not in time":              {timeout: time.Second, want: "ABANDON"},
		"AutoScaling is throttled": {refuse: []string{"Throttling Rate exceeded", "AccessDenied User is not authorized"}, converges: true, timeout: time.Hour, want: "CONTINUE"},
		"not held back yet":        {refuse: []string{"ValidationError No active Lifecycle Action found with instance ID i-0123456789abcdef0"}, converges: true, timeout: time.Hour, want: "CONTINUE"},
	} {
		t.Run(name, func(t *testing.T) {
			a := startAmazon(t, map[string]string{tagGroup: "web-1"})
			a.refuse = c.refuse
			i, err := Describe(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			converged, ended := make(chan struct{}), make(chan error, 1)
			h := Hook{Name: "ready", Instance: i, Timeout: c.timeout, Beat: 20 * time.Millisecond,
				Log: slog.New(slog.DiscardHandler), pause: 10 * time.Millisecond}
			go func() { ended <- h.Run(t.Context(), converged) }()
			for deadline := time.Now().Add(20 * time.Second); a.seen("RecordLifecycleActionHeartbeat "+group) < 2; time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("no heartbeats: %q", a.actions)
				}
			}
			if n := a.seen("Complete"); n > 0 && c.converges {
				t.Errorf("completed before it had converged: %q", a.actions)
			}
			if c.converges {
				close(converged)
			}
			if err := <-ended; err != nil {
				t.Fatal(err)
			}
			if last := a.completed(); last != "CompleteLifecycleAction "+group+" "+c.want {
				t.Errorf("it ended with %s", last)
			}
		})
	}
}

// An instance that has converged is never given up, also where both became true while a heartbeat was under way.
func TestHookPrefersConverged(t *testing.T) {
	a := startAmazon(t, map[string]string{tagGroup: "web-1"})
	i, err := Describe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	converged := make(chan struct{})
	close(converged)
	for range 20 {
		h := Hook{Name: "ready", Instance: i, Beat: time.Hour, Log: slog.New(slog.DiscardHandler)}
		if err := h.Run(t.Context(), converged); err != nil {
			t.Fatal(err)
		}
	}
	for _, action := range a.actions {
		if !strings.HasSuffix(action, " CONTINUE") {
			t.Errorf("it ended with %s", action)
		}
	}
}

func TestHookWithoutGroup(t *testing.T) {
	startAmazon(t, map[string]string{})
	h := Hook{Name: "ready", Instance: Instance{ID: "i-1"}, Timeout: time.Hour, Log: slog.New(slog.DiscardHandler)}
	if err := h.Run(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "autoscaling_group") {
		t.Errorf("got %v", err)
	}
}

// A call that is taken and never answered keeps nobody from being told.
func TestHookWithoutAnswer(t *testing.T) {
	const group = "web-1/ready/i-0123456789abcdef0"
	for name, c := range map[string]struct {
		hangs   string
		timeout time.Duration
		want    string
	}{
		"a heartbeat, and the node converges": {"RecordLifecycleActionHeartbeat", time.Hour, "CONTINUE"},
		"a heartbeat, and the time is over":   {"RecordLifecycleActionHeartbeat", time.Second, "ABANDON"},
		"the completion":                      {"CompleteLifecycleAction", time.Hour, "CONTINUE"},
	} {
		t.Run(name, func(t *testing.T) {
			a := startAmazon(t, map[string]string{tagGroup: "web-1"})
			a.hang[c.hangs] = 1
			i, err := Describe(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			converged, ended := make(chan struct{}), make(chan error, 1)
			h := Hook{Name: "ready", Instance: i, Timeout: c.timeout, Beat: 20 * time.Millisecond, Log: slog.New(slog.DiscardHandler), answer: time.Minute}
			if c.hangs == "CompleteLifecycleAction" {
				h.answer = time.Second
				close(converged)
			}
			go func() { ended <- h.Run(t.Context(), converged) }()
			<-a.hung
			if c.want == "CONTINUE" && h.answer > time.Second {
				close(converged)
			}
			select {
			case err = <-ended:
			case <-time.After(30 * time.Second):
				a.CloseClientConnections()
				t.Fatal("AutoScaling is told nothing")
			}
			if err != nil {
				t.Fatal(err)
			}
			if n := a.seen("CompleteLifecycleAction " + group + " " + c.want); n == 0 {
				t.Errorf("it asked for %q", a.actions)
			}
		})
	}
}

// An instance that converges while AutoScaling can't be told to give it up is kept.
func TestHookConvergesWhileItIsGivenUp(t *testing.T) {
	a := startAmazon(t, map[string]string{tagGroup: "web-1"})
	a.refuse = slices.Repeat([]string{"AccessDenied User is not authorized"}, 1000)
	i, err := Describe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	converged, ended := make(chan struct{}), make(chan error, 1)
	h := Hook{Name: "ready", Instance: i, Timeout: time.Millisecond, Beat: time.Hour, Log: slog.New(slog.DiscardHandler)}
	go func() { ended <- h.Run(t.Context(), converged) }()
	for deadline := time.Now().Add(20 * time.Second); a.seen("CompleteLifecycleAction") == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it isn't given up")
		}
	}
	close(converged)
	a.mu.Lock()
	a.refuse = nil
	a.mu.Unlock()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if last := a.completed(); !strings.HasSuffix(last, " CONTINUE") {
		t.Errorf("it ended with %s", last)
	}
}

// An agent that only restarted has nothing to complete, and gives up in time; while it may not ask, it can't know,
// and goes on.
func TestHookWithoutAction(t *testing.T) {
	a := startAmazon(t, map[string]string{tagGroup: "web-1"})
	a.refuse = append(slices.Repeat([]string{"AccessDenied User is not authorized"}, 3),
		slices.Repeat([]string{"ValidationError No active Lifecycle Action found with instance ID i-0123456789abcdef0"}, 1000)...)
	i, err := Describe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	converged := make(chan struct{})
	close(converged)
	h := Hook{Name: "ready", Instance: i, Timeout: time.Hour, Log: slog.New(slog.DiscardHandler),
		actionWait: time.Millisecond, pause: time.Millisecond}
	if err := h.Run(t.Context(), converged); err != nil {
		t.Fatal(err)
	}
	if n := a.seen("CompleteLifecycleAction"); n != 4 {
		t.Errorf("it asked %d times", n)
	}
	// Any other refusal is one to try again: the hook or the group may only be misspelt. Each cause is logged once, also
	// if the action isn't known at first.
	var logged strings.Builder
	h.Log, h.actionWait = slog.New(slog.NewTextHandler(&logged, nil)), time.Hour
	a.refuse = []string{"ValidationError No active Lifecycle Action found", "ValidationError No such group",
		"ValidationError No such group", "ResourceContention No active Lifecycle Action"}
	if err := h.Run(t.Context(), converged); err != nil {
		t.Fatal(err)
	}
	if n := a.seen("CompleteLifecycleAction"); n < 9 {
		t.Errorf("it asked %d times", n)
	}
	if n := strings.Count(logged.String(), "can't be completed"); n != 2 {
		t.Errorf("failures were logged %d times: %s", n, logged.String())
	}
}

// A denial is logged also if other trouble came before it: the agent would repeat it without a word.
func TestHookLogsEachCause(t *testing.T) {
	a := startAmazon(t, map[string]string{tagGroup: "web-1"})
	a.hang["CompleteLifecycleAction"] = 1
	a.refuse = slices.Repeat([]string{"AccessDenied User is not authorized"}, 2)
	i, err := Describe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	converged := make(chan struct{})
	close(converged)
	var logged strings.Builder
	h := Hook{Name: "ready", Instance: i, Timeout: time.Hour, Beat: time.Hour, answer: time.Second,
		pause: time.Millisecond, Log: slog.New(slog.NewTextHandler(&logged, nil))}
	if err := h.Run(t.Context(), converged); err != nil {
		t.Fatal(err)
	}
	for what, want := range map[string]int{"can't be completed": 2, "deadline exceeded": 1, "AccessDenied": 1} {
		if n := strings.Count(logged.String(), what); n != want {
			t.Errorf("%q was logged %d times, want %d:\n%s", what, n, want, logged.String())
		}
	}
}
