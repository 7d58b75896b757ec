package ec2

import (
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

// amazon plays the metadata service (IMDSv2) and the AutoScaling API (AWS query protocol) as their documentation has them.
type amazon struct {
	*httptest.Server
	tags map[string]string // nil: not enabled in the metadata

	mu      sync.Mutex
	actions []string // ACTION group/hook/instance RESULT
	refuse  []string // error codes and messages of the next calls that complete
}

const token = "AQAAAB-token"

func startAmazon(t *testing.T, tags map[string]string) *amazon {
	a := &amazon{tags: tags}
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

func TestHook(t *testing.T) {
	const group = "web-1/ready/i-0123456789abcdef0"
	for name, c := range map[string]struct {
		refuse    []string
		converges bool
		timeout   time.Duration
		want      string
	}{
		"converged":                {converges: true, timeout: time.Hour, want: "CONTINUE"},
		"not in time":              {timeout: 300 * time.Millisecond, want: "ABANDON"},
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
			h := Hook{Name: "ready", Instance: i, Timeout: c.timeout, Beat: 20 * time.Millisecond, Log: slog.New(slog.DiscardHandler)}
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
			if last := a.actions[len(a.actions)-1]; last != "CompleteLifecycleAction "+group+" "+c.want {
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
