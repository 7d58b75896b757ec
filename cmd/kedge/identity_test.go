package main

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"kedge/deployments"
	"kedge/kv/kvtest"
)

// issuer signs JWTs, as a platform does for its instances.
type issuer struct {
	key    *rsa.PrivateKey
	public []byte // PEM
}

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return &issuer{key, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public})}
}

// jwt returns the identity of prod/web's web-1, with other claims where they are given.
func (i *issuer) jwt(t *testing.T, others map[string]any) string {
	t.Helper()
	claims := map[string]any{"iss": "https://id.example.com", "aud": "kedge", "node": "web-1", "stage": "prod",
		"roles": []string{"web"}, "exp": time.Now().Add(time.Hour).Unix(), "nbf": time.Now().Add(-time.Minute).Unix()}
	maps.Copy(claims, others)
	body, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	part := base64.RawURLEncoding.EncodeToString
	signed := part([]byte(`{"alg":"RS256","typ":"JWT"}`)) + "." + part(body)
	digest := sha256.Sum256([]byte(signed))
	signature, err := rsa.SignPKCS1v15(rand.Reader, i.key, crypto.SHA256, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	return signed + "." + part(signature)
}

// writeIdentity writes web-1's JWT, and the key to check it by.
func writeIdentity(t *testing.T, dir string) {
	t.Helper()
	i := newIssuer(t)
	for name, data := range map[string][]byte{"identity.jwt": []byte(i.jwt(t, nil)), "identity.pem": i.public} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// The auth method and the binding rule of the manual give a node its own token, and nobody another's: not for the JWT
// of another stage, role or node, of another issuer, for another audience, or past its time.
func TestIdentitiesOfOthersAreRefused(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{ACL: true})
	page, err := os.ReadFile("../../deployments/docs/autoscaling.md")
	if err != nil {
		t.Fatal(err)
	}
	written := func(pattern string) string {
		t.Helper()
		m := regexp.MustCompile(pattern).FindSubmatch(page)
		if m == nil {
			t.Fatalf("the manual's page has no %s", pattern)
		}
		return string(m[1])
	}
	platform := newIssuer(t)
	public, err := json.Marshal(string(platform.public))
	if err != nil {
		t.Fatal(err)
	}
	var config map[string]any
	key := written(`(\$\(jq [^)]*\))`)
	text := strings.Replace(written(`(?s)method.json <<END\n(.*?)\nEND`), key, string(public), 1)
	if err := json.Unmarshal([]byte(text), &config); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	acl := c.Client().ACL()
	if _, _, err := acl.AuthMethodCreate(&api.ACLAuthMethod{Name: "kedge", Type: "jwt", Config: config,
		MaxTokenTTL: time.Hour}, nil); err != nil {
		t.Fatal(err)
	}
	for _, node := range []string{"web-1", "db-1"} {
		role := strings.TrimSuffix(node, "-1")
		rules := deployments.ConsulRules("agent", deployments.RuleVars{Stage: "prod", Role: role, Node: node})
		if _, _, err := acl.PolicyCreate(&api.ACLPolicy{Name: "kedge-node-" + node, Rules: rules}, nil); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := acl.BindingRuleCreate(&api.ACLBindingRule{AuthMethod: "kedge", BindType: "policy",
		BindName: written(`-bind-name '([^']*)'`), Selector: written(`-selector '([^']*)'`)}, nil); err != nil {
		t.Fatal(err)
	}
	login := func(jwt string) (string, error) {
		token, _, err := acl.Login(&api.ACLLoginParams{AuthMethod: "kedge", BearerToken: jwt}, nil)
		if err != nil {
			return "", err
		}
		return token.SecretID, nil
	}

	token, err := login(platform.jwt(t, nil))
	if err != nil {
		t.Fatalf("the node's own: %v", err)
	}
	own := c.Servers[0].Client(token).KV()
	if _, err := own.Put(&api.KVPair{Key: "kedge/status/prod/web/web-1", Value: []byte("{}")}, nil); err != nil {
		t.Errorf("the node's own report: %v", err)
	}
	for _, key := range []string{
		"kedge/status/prod/db/db-1", "kedge/status/prod/web/web-2", "kedge/desired/prod/web/app",
	} {
		if _, err := own.Put(&api.KVPair{Key: key, Value: []byte("{}")}, nil); err == nil {
			t.Errorf("the node's token may write %s", key)
		}
	}
	for what, jwt := range map[string]string{
		"of another stage":         platform.jwt(t, map[string]any{"stage": "test"}),
		"of another role":          platform.jwt(t, map[string]any{"roles": []string{"db"}}),
		"of no stage":              platform.jwt(t, map[string]any{"stage": nil}),
		"of a node without policy": platform.jwt(t, map[string]any{"node": "web-3"}),
		"for another audience":     platform.jwt(t, map[string]any{"aud": "vault"}),
		"of another issuer":        platform.jwt(t, map[string]any{"iss": "https://id.example.org"}),
		"signed by somebody else":  newIssuer(t).jwt(t, nil),
		"past its time":            platform.jwt(t, map[string]any{"exp": time.Now().Add(-time.Hour).Unix()}),
	} {
		if _, err := login(jwt); err == nil {
			t.Errorf("a JWT %s gets a token", what)
		}
	}
}
